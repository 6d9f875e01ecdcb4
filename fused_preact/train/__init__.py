"""Training on scikit-learn's digits and on CIFAR: ``python -m fused_preact.train --help``.

``config`` holds the recipes, ``data`` and ``cifar`` the images, ``loop`` an epoch, ``checkpoint`` the files that
survive a kill, ``measure`` speed and memory, ``log`` what is shown, ``run`` a whole run, ``cli`` the flags.
"""
