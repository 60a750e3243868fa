"""Tasks by name: what a network is trained for and judged on. A new one is a file and a line here.

A task is a module with `load(data_dir, train)`, which gives a data set as lab.tasks.batches says.
"""

from lab.tasks import cifar10, imagefolder, synthetic

TASKS = {"cifar10": cifar10, "synthetic": synthetic, "imagefolder": imagefolder}
