"""The matcher: sites, chains of sites with their shortcut, and heads in an FX graph.

It knows operations, never class names. A *site* is BN -> ReLU (or nothing) -> convolution whose activation nobody
else needs; a *chain* is one or more sites, each reading what the one before made, and perhaps an addition at its end:
with the shortcut of He et al. 2016 it is a whole residual unit. Both read raw ``x`` where the chain ends instead of
where it began, so nothing may write to ``x`` in between.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import Graph, Node

from .roles import Add, Convolve, Modules, Normalise, Pad, Pool, Relu, Role, Same, role_of, written_operand

__all__ = ["Chain", "Found", "Head", "Left", "Site", "match"]


@dataclass(eq=False)
class Site:
    """BN -> ReLU (or nothing) -> convolution."""

    norm: Normalise
    relu: Relu | None
    conv: Convolve
    between: list[Role]
    """What passes the tensor on, or pads it, between the three."""
    x: Node

    @property
    def active(self) -> Node:
        """The value that the convolution reads, but for padding."""
        return self.norm.node if self.relu is None else self.relu.node

    def nodes(self) -> list[Node]:
        made = dict.fromkeys([self.norm.node, self.active])
        return [*made, *(role.node for role in self.between), self.conv.node]


@dataclass(eq=False)
class Chain:
    """Sites, and what is added to the output of the last."""

    sites: list[Site]
    add: Add | None = None
    shortcut: str | None = None
    """"identity" (``x`` of the first site), "activation" (its activation), "projection" or "residual"."""
    projection: Site | None = None
    residual: Node | None = None
    siblings: list[Site] = field(default_factory=list)
    """Sites of other chains that read the activation of the first site too."""

    @property
    def x(self) -> Node:
        return self.sites[0].x

    @property
    def last(self) -> Node:
        """The node whose value the chain computes."""
        return self.sites[-1].conv.node if self.add is None else self.add.node

    def nodes(self) -> list[Node]:
        """All that the chain takes the place of."""
        sites = [*self.sites, *([] if self.projection is None else [self.projection])]
        found = [node for site in sites for node in site.nodes()]
        return list(dict.fromkeys([*found, *([] if self.add is None else [self.add.node])]))


@dataclass(eq=False)
class Head:
    """BN -> ReLU -> global average pool."""

    norm: Normalise
    relu: Relu
    pool: Pool
    between: list[Role]
    x: Node

    @property
    def last(self) -> Node:
        return self.pool.node

    def nodes(self) -> list[Node]:
        return [self.norm.node, self.relu.node, *(role.node for role in self.between), self.pool.node]


@dataclass(eq=False)
class Left:
    """A convolution (or a normalisation before a pool) that stays as it is, and why."""

    node: Node
    reason: str


@dataclass(eq=False)
class Found:
    """What :func:`match` found."""

    chains: list[Chain]
    heads: list[Head]
    left: list[Left]
    values: Values
    additions: list[Add]
    """Residual additions that no chain makes."""

    @property
    def matches(self) -> list[Chain | Head]:
        return [*self.chains, *self.heads]


class Values:
    """Who reads which value, with in-place operations taken as making a new value of the same tensor."""

    def __init__(self, graph: Graph, modules: Modules) -> None:
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.roles = {node: role_of(node, modules) for node in graph.nodes}
        self.writes = {node: written_operand(node, modules) for node in graph.nodes}
        self.norms = [role for role in self.roles.values() if isinstance(role, Normalise)]
        self.readers: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
        self._read: dict[tuple[Node, Node], Node] = {}
        self._family: dict[Node, Node] = {}
        now: dict[Node, Node] = {}
        for node in graph.nodes:
            for operand in node.all_input_nodes:
                value = now.get(operand, operand)
                self._read[node, operand] = value
                self.readers[value].append(node)
            written = self.writes[node]
            role = self.roles[node]
            if written is not None:
                before = now.get(written, written)
                for name, value in [*now.items(), (written, before)]:
                    if value is before:
                        now[name] = node
                self._join(node, written)
            elif role is None or isinstance(role, Same):
                # Whatever is not known to make a new tensor may hand on one of its operands, or a view of it.
                for operand in node.all_input_nodes:
                    self._join(node, operand)

    def value(self, node: Node, operand: Node) -> Node:
        """What ``node`` reads under the name ``operand``."""
        return self._read[node, operand]

    def operands(self, node: Node, value: Node) -> list[Node]:
        """The names under which ``node`` reads ``value``."""
        return [operand for operand in node.all_input_nodes if self._read.get((node, operand)) is value]

    def _root(self, node: Node) -> Node:
        while node in self._family:
            node = self._family[node]
        return node

    def _join(self, a: Node, b: Node) -> None:
        a, b = self._root(a), self._root(b)
        if a is not b:
            self._family[a] = b

    def written_between(self, x: Node, begin: Node, end: Node, own: set[Node]) -> bool:
        """Whether a node between two others, not one of ``own``, writes to memory that ``x`` may share."""
        family = self._root(x)
        return any(
            written is not None
            and self.order[begin] < self.order[node] < self.order[end]
            and node not in own
            and self._root(written) is family
            for node, written in self.writes.items()
        )

    def overtaken(self, norms: list[Normalise], end: Node) -> bool:
        """Whether the statistics of one of ``norms``, run at ``end``, would be updated after a later call's."""
        return any(
            self.order[norm.node] < self.order[other.node] < self.order[end]
            and other not in norms
            and self._statistics(other) == self._statistics(norm)
            for norm in norms
            for other in self.norms
        )

    def _statistics(self, norm: Normalise) -> Any:
        """What tells a norm's running statistics from another's."""
        if norm.module is not None:
            return id(norm.module)
        return [None if node is None else (node.op, node.target) for node in norm.tensors[:2]]

    def private(self, write: Node, written: Node) -> bool:
        """Whether nobody could tell if ``write`` made a new tensor instead: no view of ``written`` is read after it,
        nor any tensor that came from outside.
        """
        family = self._root(written)
        for node, begun in self.order.items():
            if begun >= self.order[write] or self._root(node) is not family:
                continue
            if node.op in ("placeholder", "get_attr") or (
                node.op == "call_module" and self.roles[node] is None
            ):
                return False
            for reader in node.users:
                if self.order[reader] > self.order[write] > self.order[self.value(reader, node)]:
                    return False
        return True


def match(graph: Graph, modules: Modules) -> Found:
    """Everything that can run fused; chains do not overlap."""
    values = Values(graph, modules)
    left: list[Left] = []
    sites: list[Site] = []
    for role in values.roles.values():
        if isinstance(role, Convolve):
            found = _site(role, values)
            (sites if isinstance(found, Site) else left).append(found)  # type: ignore[arg-type]
    sites += _subsampled(sites, values)
    sites = list(_undisturbed(sites, values, left))
    while spoiled := _unmade(chains := _chains(sites, values), values):
        left += [
            Left(site.conv.node, "the activation is added elsewhere too")
            for site in sites
            if site.active in spoiled
        ]
        sites = [site for site in sites if site.active not in spoiled]
    convolved = {site.conv.node for site in sites}
    heads = []
    for role in values.roles.values():
        if isinstance(role, Pool) and role.node not in convolved:
            head = _head(role, values)
            if isinstance(head, Head):
                heads.append(head)
            elif head is not None:
                left.append(head)
    made = {chain.add.node for chain in chains if chain.add is not None}
    additions = [r for r in values.roles.values() if isinstance(r, Add) and r.node not in made]
    return Found(chains, heads, left, values, additions)


def _through(value: Node, values: Values, pads: bool = False) -> tuple[Node, list[Role]]:
    """``value`` with what passes it on (or pads it) taken off."""
    between: list[Role] = []
    role = values.roles.get(value)
    while isinstance(role, Same) or (pads and isinstance(role, Pad)):
        between.append(role)
        value = values.value(role.node, role.x)
        role = values.roles.get(value)
    return value, between


def _readers(value: Node, values: Values) -> Iterator[Node]:
    """Who reads ``value``, also by way of what passes it on or pads it."""
    for reader in values.readers[value]:
        if isinstance(values.roles[reader], Same | Pad):
            yield from _readers(reader, values)
        else:
            yield reader


def _activation(end: Role, values: Values) -> tuple[Normalise, Relu | None, list[Role], Node] | Left:
    """The BN and the ReLU (or none) that ``end`` reads the activation of, what is between, and the BN's input."""
    a, between = _through(values.value(end.node, end.x), values, pads=True)
    relu = values.roles.get(a)
    if isinstance(relu, Normalise):
        return relu, None, between, values.value(relu.node, relu.x)
    if not isinstance(relu, Relu):
        return Left(end.node, f"reads {_called(a)}, not a ReLU")
    z, more = _through(values.value(relu.node, relu.x), values)
    norm = values.roles.get(z)
    if not isinstance(norm, Normalise):
        return Left(end.node, f"its ReLU reads {_called(z)}, no plain BatchNorm2d")
    if any(reader is not relu.node for reader in _readers(z, values)):
        return Left(end.node, "the normalised tensor is needed elsewhere too")
    return norm, relu, [*between, *more], values.value(norm.node, norm.x)


def _called(node: Node) -> str:
    if node.op == "placeholder":
        return "what it is given"
    target = (
        node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    )
    return f"{target!r}"


LEAST_CHANNELS = 4
"""Of a site's input. Vectors and tiles hold 16 channels and more: BN and the 7x7 stem of an image took 2.7 times as
long fused as one after the other (Intel Xeon, AVX-512, AMX, 2 cores, torch 2.13.0)."""


def _site(conv: Convolve, values: Values) -> Site | Left:
    found = _activation(conv, values)
    if isinstance(found, Left):
        return found
    if conv.channels is not None and conv.channels < LEAST_CHANNELS:
        return Left(conv.node, f"reads {conv.channels} channels, which is faster one by one")
    norm, relu, between, x = found
    pads = [role.size for role in between if isinstance(role, Pad)]
    if pads:
        pad = sum(rows for rows, _ in pads), sum(columns for _, columns in pads)
        conv = replace(conv, pad=pad)
    return Site(norm, relu, conv, between, x)


def _subsampled(sites: list[Site], values: Values) -> Iterator[Site]:
    """1x1 pools with a stride that read an activation beside a convolution: the shortcut of the paper's option A.

    As sites whose convolution has the identity for a weight, so that nobody needs the activation itself.
    """
    active = {site.active for site in sites}
    for role in values.roles.values():
        if isinstance(role, Pool) and role.window == (1, 1) and role.stride not in (None, 1, (1, 1)):
            stride = (role.stride,) * 2 if isinstance(role.stride, int) else tuple(role.stride)
            conv = Convolve(role.node, role.x, None, (), (stride, (0, 0), (1, 1), 1))
            found = _site(conv, values)
            if isinstance(found, Site) and found.active in active:
                yield found


def _head(pool: Pool, values: Values) -> Head | Left | None:
    found = _activation(pool, values)
    if isinstance(found, Left):
        return None
    norm, relu, between, x = found
    if relu is None or any(isinstance(role, Pad) for role in between):
        return None
    if any(reader is not pool.node for reader in _readers(relu.node, values)):
        return Left(pool.node, "the activation is needed elsewhere too")
    head = Head(norm, relu, pool, between, x)
    if values.written_between(x, norm.node, pool.node, set(head.nodes())):
        return Left(pool.node, "its input is written to in between")
    return head


def _undisturbed(sites: list[Site], values: Values, left: list[Left]) -> Iterator[Site]:
    """The sites whose activation nobody but convolutions (and one addition) needs, and whose x stays as it is."""
    for active, group in _sharing(sites).items():
        convs = {site.conv.node for site in group}
        others = [reader for reader in _readers(active, values) if reader not in convs]
        # A shortcut that carries the activation itself: whether a chain takes it is seen later.
        carried = [r for r in others if isinstance(values.roles[r], Add)]
        for site in group:
            own = {node for s in group for node in s.nodes()}
            if len(others) > len(carried) or len(carried) > 1:
                read = "normalised tensor" if site.relu is None else "activation"
                reason = f"the {read} is needed by {_called(others[0])} too"
                left.append(Left(site.conv.node, reason))
            elif values.written_between(site.x, site.norm.node, site.conv.node, own):
                left.append(Left(site.conv.node, "its input is written to in between"))
            elif values.overtaken([site.norm], site.conv.node):
                left.append(Left(site.conv.node, "its normalisation is called again in between"))
            else:
                yield site


def _sharing(sites: list[Site]) -> dict[Node, list[Site]]:
    """The sites that read each activation."""
    found: dict[Node, list[Site]] = {}
    for site in sites:
        found.setdefault(site.active, []).append(site)
    return found


def _chains(sites: list[Site], values: Values) -> list[Chain]:
    by_conv = {site.conv.node: site for site in sites}
    sharing = _sharing(sites)

    def before(site: Site) -> Site | None:
        """The site whose output ``site`` alone reads."""
        if len(sharing[site.active]) > 1 or len(list(_readers(site.active, values))) > 1:
            return None
        source, _ = _through(site.x, values)
        earlier = by_conv.get(source)
        if earlier is None or list(_readers(source, values)) != [site.norm.node]:
            return None
        return earlier

    def row(site: Site) -> list[Site]:
        """The chain that ends with ``site``."""
        found = [site]
        while (earlier := before(found[0])) is not None:
            found.insert(0, earlier)
        return found

    taken: set[Node] = set()
    chains: list[Chain] = []
    for role in values.roles.values():
        if isinstance(role, Add):
            candidates = [c for c in _endings(role, by_conv, row, values) if _free(c, taken, values)]
            if candidates:
                chain = max(candidates, key=lambda c: (c.shortcut != "residual", len(c.sites)))
                chains.append(chain)
                taken.update(chain.nodes())
    for site in reversed(sites):
        if site.conv.node not in taken:
            rest: list[Site] = []
            for member in reversed(row(site)):
                if member.conv.node in taken:
                    break
                rest.insert(0, member)
            chain = Chain(rest)
            while not _free(chain, set(), values):
                chain = Chain(chain.sites[1:])
            chains.append(chain)
            taken.update(node for s in chain.sites for node in (s.conv.node,))
    return sorted(chains, key=lambda chain: values.order[chain.last])


def _free(chain: Chain, taken: set[Node], values: Values) -> bool:
    """Whether the chain overlaps no other and nothing that it reads is written to before it runs."""
    if any(
        site.conv.node in taken for site in [*chain.sites, *([chain.projection] if chain.projection else [])]
    ):
        return False
    own = set(chain.nodes())
    begin, end = chain.sites[0].norm.node, chain.last
    if values.written_between(chain.x, begin, end, own):
        return False
    if values.overtaken([site.norm for site in chain.sites], end):
        return False
    residual = chain.residual
    return residual is None or not values.written_between(residual, residual, end, own)


def _endings(
    add: Add,
    by_conv: dict[Node, Site],
    row: object,
    values: Values,
) -> Iterator[Chain]:
    """The chains that ``add`` may be the end of."""
    a, b = values.value(add.node, add.x), values.value(add.node, add.other)
    if a is b:
        return
    written = values.writes[add.node]
    if written is not None and not values.private(add.node, written):
        return
    for tail, other in ((a, b), (b, a)):
        source, _ = _through(tail, values)
        site = by_conv.get(source)
        if site is None or site.conv.subsamples or list(_readers(source, values)) != [add.node]:
            continue
        sites: list[Site] = row(site)  # type: ignore[operator]
        first = sites[0]
        shared = [reader for reader in _readers(first.active, values) if reader is not first.conv.node]
        plain, _ = _through(other, values)
        x, _ = _through(first.x, values)
        projection = by_conv.get(plain)
        if plain is x and not shared:
            yield Chain(sites, add, "identity")
        elif plain is first.active and shared == [add.node]:
            yield Chain(sites, add, "activation")
        elif (
            projection is not None
            and not projection.conv.subsamples
            and projection.active is first.active
            and projection is not first
            and list(_readers(plain, values)) == [add.node]
            and shared == [projection.conv.node]
        ):
            yield Chain(sites, add, "projection", projection)
        else:
            yield Chain(sites, add, "residual", residual=other)


def _unmade(chains: list[Chain], values: Values) -> set[Node]:
    """The activations at the beginning of chains that an addition needs which none of them makes.

    Chains with the same first activation come to know their siblings.
    """
    sharing: dict[Node, list[Chain]] = {}
    for chain in chains:
        sharing.setdefault(chain.sites[0].active, []).append(chain)
    found = set()
    for active, group in sharing.items():
        own = {
            site.conv.node for c in group for site in (c.sites[0], *([c.projection] if c.projection else []))
        }
        own |= {c.add.node for c in group if c.add is not None and c.shortcut == "activation"}
        if any(reader not in own for reader in _readers(active, values)):
            found.add(active)
        for chain in group:
            chain.siblings = [other.sites[0] for other in group if other is not chain]
    return found
