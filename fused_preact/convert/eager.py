"""``fuse`` and ``unfuse``: a model's modules with their forwards rewritten, in place."""

from __future__ import annotations

import inspect
import warnings
from types import CodeType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..calls import called, observed
from ..modules import Folded
from .analysis import analyse, modes, put
from .program import Failure, Program, structure_of
from .runtime import UnitCall
from .tracing import TENSOR, Untraceable
from .verify import verify

__all__ = ["fuse", "unfuse"]

Model = TypeVar("Model", bound=nn.Module)


class FusedForward:
    """The forward of ``owner`` with fused calls; hangs on the module as its ``forward``.

    It traces the module's own forward when it is called in a mode, or with a form of arguments, that it has not seen,
    and again after the module has changed; where nothing can be fused it runs the module as it was written.
    """

    is_fused = True
    _KEPT = 8  # forms of arguments, and programs of each: two modes, a few changes of the module

    def __init__(self, owner: nn.Module, inline: list[nn.Module]) -> None:
        self.owner = owner
        self.inline = inline
        self.programs: dict[Any, list[Program | Failure]] = {}
        self.runs: dict[tuple[tuple[int, ...], bool], Any] = {}
        self.folded: Folded | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Programs belong to the modules of this process; a copy traces its own.
        return {**self.__dict__, "programs": {}, "runs": {}}

    # What is asked of a forward (torch.export, whoever wants the names of its arguments) is asked of the one written.
    __name__ = "forward"

    @property
    def __code__(self) -> CodeType:
        code: CodeType = type(self.owner).forward.__code__
        return code

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.owner).forward.__get__(self.owner))

    @property
    def matches(self) -> int:
        """How many fused calls there are in the present state of the module, called with one tensor."""
        program = self.program(1, (TENSOR,), {})
        return 0 if program is None else program.matches

    def unit(self) -> UnitCall | None:
        """What the module computes with if it is now one residual unit and nothing else, else None."""
        program = self.program(1, (TENSOR,), {})
        return None if program is None else program.unit(self.owner)

    def written(self, *args: Any, **kwargs: Any) -> Any:
        """The forward as it was written."""
        return type(self.owner).forward(self.owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self._compiled(args, kwargs)
        module = called(self.owner)
        if module is not self.owner:
            return type(module).forward(module, *args, **kwargs)
        if not kwargs and all(isinstance(t, Tensor) for t in args):
            key: Any = len(args)
            tensors: Any = args
        else:
            key, tensors, _ = structure_of(args, kwargs)
        if self.folded is not None and key == 1:
            output = self.folded(args[0])
            if output is not None:
                return output
        if not tensors or observed(tensors[0]):
            return self.written(*args, **kwargs)
        program = self.program(key, args, kwargs)
        if program is None:
            return self.written(*args, **kwargs)
        return program.run(self.owner, *tensors)

    def _compiled(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call under ``torch.compile``, which reads the modules of the graph and so guards on what they are."""
        if kwargs or not all(isinstance(a, Tensor | list | tuple) for a in args):
            return self.written(*args, **kwargs)
        form = tuple(
            0 if isinstance(a, Tensor) else len(a) * (1 if isinstance(a, list) else -1) for a in args
        )
        tensors = [t for a in args for t in ([a] if isinstance(a, Tensor) else a)]
        if not all(isinstance(t, Tensor) for t in tensors) or not self.prepared(form, self.owner.training):
            return self.written(*args)
        return self.runs[form, self.owner.training](self.owner, *tensors)

    def prepared(self, form: tuple[int, ...], training: bool) -> bool:
        """Whether :attr:`runs` has a program for such arguments now; ``torch.compile`` asks while it traces.

        ``form`` is 0 for a tensor, the length of a list of tensors, and that of a tuple of them with a minus.
        """
        args = tuple([TENSOR] * n if n > 0 else (TENSOR,) * -n if n else TENSOR for n in form)
        program = self.program(form, args, {})
        if program is None:
            return False
        self.runs[form, training] = program.run
        return True

    # What torch.compiler.assume_constant_result does, which would import Dynamo (two seconds) with this package.
    prepared._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def program(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Program | None:
        """The program for arguments of this form in the present state of the module, None: it runs as written."""
        # What a forward may set around a part of itself shows in its trace only where it makes a difference.
        key = (
            key,
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch._C._is_any_autocast_enabled(),
        )
        kept = self.programs.get(key, [])
        for program in kept:
            if program.valid():
                if program is not kept[0]:  # a mode lasts
                    self._keep(key, program)
                return program if isinstance(program, Program) and program.matches else None
        if key not in self.programs and len(self.programs) >= self._KEPT:
            return None  # called with a new number each time
        _, _, structure = structure_of(args, kwargs)
        inline = set(map(id, self.inline))
        made: Program | Failure
        try:
            made = Program(self.owner, lambda m: id(m) in inline, structure)
        except Untraceable:
            made = Failure(self.owner)
        self._keep(key, made)
        return made if isinstance(made, Program) and made.matches else None

    def _keep(self, key: Any, program: Program | Failure) -> None:
        """Put it first. Tables are replaced as a whole, so that threads see one or the other."""
        rest = [other for other in self.programs.get(key, []) if other is not program]
        self.programs = {**self.programs, key: [program, *rest][: self._KEPT]}


def fuse(model: Model, example_input: Any = None) -> Model:
    """Let every BN -> ReLU (or nothing) -> convolution site in ``model`` run fused, in place; returns ``model``.

    Found are the operations, whatever module, function or method they are spelled with: sites, chains of sites with
    the residual addition at their end (a whole unit is then one call), and the head BN -> ReLU -> global average
    pool. Everything else runs as it was written. The model is traced as a whole or block by block
    (:mod:`torch.fx`); a block that cannot be traced is left alone. :func:`explain` says what became of each site.

    Modules, parameters, buffers and their names stay the same objects, so optimisers, state dicts, hooks, copies and
    pickles go on working. A later change of a module (another BN, a hook, a parametrisation, ``eval()``) is noticed
    at the next call; a state that is neither an attribute of a module nor a tensor (a global variable, an object
    that a module holds) is read when the model is traced.

    With ``example_input`` (a tensor, or a tuple of the model's arguments) the fused model is compared with the plain
    one, in training and evaluation, float64 and its own dtype: outputs, gradients and running statistics. On
    disagreement the model is restored and a RuntimeError names the first tensor that differs.

    Raises TypeError for something that is no module or is scripted, ValueError for uninitialised (lazy) parameters
    and for an ``example_input`` that the model refuses; the model is then as it was. Warns where nothing is found.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, allowed is a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("model: got a scripted module, allowed is the torch.nn.Module that it was made of")
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if torch.nn.parameter.is_lazy(tensor):
                raise ValueError(
                    f"model: got the uninitialised {kind} {name!r}, allowed is a model that has run once"
                )
    before = [(m, m.__dict__["forward"]) for m in model.modules() if _is_fused(m)]
    unfuse(model)
    owners: dict[str, set[str]] = {}
    with modes(model) as every:
        for mode in every:
            put(mode)
            for path, inline in analyse(model).owners().items():
                owners.setdefault(path, set()).update(inline)
    if not owners and not _has_own(model):
        warnings.warn(
            f"fused_preact.fuse: found nothing to fuse in {type(model).__name__}; "
            "fused_preact.explain(model) says why",
            UserWarning,
            stacklevel=2,
        )
    fused = [
        (module, FusedForward(module, [model.get_submodule(p) for p in sorted(inline) if p != path]))
        for path, inline in owners.items()
        for module in (model.get_submodule(path),)
    ]
    if example_input is not None:
        try:
            verify(model, fused, example_input)
        except BaseException:
            _hang(before)
            raise
    _hang(fused)
    return model


def _hang(forwards: list[tuple[nn.Module, Any]]) -> None:
    for module, forward in forwards:
        module.forward = forward


def unfuse(model: Model) -> Model:
    """Undo :func:`fuse`: every forward is as it was written; returns ``model``. TypeError where it is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, allowed is a torch.nn.Module")
    for module in model.modules():
        if _is_fused(module):
            del module.__dict__["forward"]
    return model


def _is_fused(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), FusedForward)


def _has_own(model: nn.Module) -> bool:
    """Whether the model holds modules of this package, which are fused by themselves."""
    return any(type(m).__module__.startswith("fused_preact.") for m in model.modules())
