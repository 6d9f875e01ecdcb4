"""Images to train and to test on: ``load_for`` gives a run's data, ``Batches`` and ``plain_batches`` its batches.

``sets`` has the data sets by name. ``draws`` derives every random number from its place, ``batches`` shares batches
out to ranks, ``mix`` is mixup and cutmix. ``memory`` holds digits and CIFAR on the device, ``cifar`` reads CIFAR's
archives, ``download`` fetches them. ``files`` makes batches of image files in worker processes: ``index`` finds them
in folders and shards, ``views`` decodes and crops, ``colour`` is the augmentation that the device applies.
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
