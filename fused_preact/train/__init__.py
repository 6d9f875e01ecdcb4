"""Training on scikit-learn's digits, CIFAR and ImageNet: ``python -m fused_preact.train --help``.

``recipes`` has the recipes by name, ``config`` what they and a run consist of, ``data`` the images, ``loop`` an
epoch, ``checkpoint`` the files that survive a kill, ``measure`` speed and memory, ``log`` what is shown, ``run`` a
whole run, ``flags`` and ``cli`` the command line.
"""
