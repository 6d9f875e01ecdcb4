"""Images to train and to test on: ``load_for`` gives a run's data, ``Batches`` and ``plain_batches`` its batches.

``draws`` derives every random number from its place, ``batches`` shares batches out to ranks, ``mix`` is mixup and
cutmix, ``memory`` holds digits and CIFAR on the device, ``cifar`` reads the archives.
"""

from .batches import Batches, Source, plain_batches
from .memory import Split, augment, normalise
from .sets import DataSet, check_card, load, load_for

__all__ = [
    "Batches",
    "DataSet",
    "Source",
    "Split",
    "augment",
    "check_card",
    "load",
    "load_for",
    "normalise",
    "plain_batches",
]
