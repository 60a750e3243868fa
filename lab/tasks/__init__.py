"""Tasks by name: what a network is trained for and judged on. A new one is a file and a line here.

A task is a module:

    load(data_dir, train)     its data set, as lab.tasks.batches says: to train on, or to test on
    load_val(data_dir)        that to choose weights on, where it is no part of the former
    to_input(images, side)    the network's input, of the uint8 images of a training batch
    objective                 a module: what is learnt of these images, and how that is judged

An objective, such as lab.tasks.classification, has

    batch       a batch to train on (see lab.tasks.batches.TrainBatches): images and targets,
                tensors with a row for each image; AUGMENT are the kinds of augmentation that it
                knows, the default last
    loss        of the network's outputs for these: what to minimize, and how much was right, which
                is TRAIN_METRIC: a number from 0 to 1 an image, summed
    judge       what to keep of its outputs for images without augmentation, a row for each image
    score       what all that comes to: {"loss", METRIC, ...}, METRIC in percent; of these a row of
                results holds what is called _pct (lab.report.rows knows the names)
    written     a score in words
"""

from lab.tasks import cifar10, coco, imagefolder, masks, synthetic

TASKS = {
    "cifar10": cifar10,
    "synthetic": synthetic,
    "imagefolder": imagefolder,
    "detection": coco,
    "segmentation": masks,
}
