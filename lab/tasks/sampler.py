"""Which images a training step takes, and how large they are: a function of the step.

With several scales, a batch of small images has more of them and one of large images fewer, so that
all cost the same: the multi-scale sampler of MobileViT's paper (section 3.2).
"""

import numpy as np

# The paper's sides, 160, 192, 256, 288 and 320, over the 256 that networks are evaluated at.
SCALES = (5 / 8, 3 / 4, 1, 9 / 8, 5 / 4)
MULTIPLE = 8  # of images in a batch: they can be shared among as many processes


class Sampler:
    """Batches of `batch_size` images, in epochs over `n_images` of them.

    With `multi_scale` there are batches at each of SCALES, of as many images as make the same
    number of pixels, rounded down to a MULTIPLE.

    An epoch has each scale equally often, in an order drawn with `seed`, and no image twice; the
    images that do not fill another round of all scales are left for the next shuffle. The authors
    draw every step's scale by itself and in each process, and fill the last batch up; this way all
    epochs have the same number of steps, and processes see what one would.
    """

    def __init__(self, n_images: int, batch_size: int, seed: int, multi_scale: bool = False):
        self.scales = SCALES if multi_scale else (1,)
        self.seed = seed
        self.sizes = [batch_size]
        if multi_scale:
            self.sizes = [int(batch_size / s**2) // MULTIPLE * MULTIPLE for s in SCALES]
        self.rounds = n_images // sum(self.sizes)  # in an epoch

    @property
    def steps_per_epoch(self) -> int:
        return self.rounds * len(self.scales)

    @property
    def steps_to_all_scales(self) -> int:
        """Return how many of the first steps it takes until each scale has come."""
        order = self._order(0).tolist()
        return 1 + max(order.index(k) for k in range(len(self.scales)))

    def scale(self, step: int) -> float:
        """Return the sides of the images of `step` over those of the schedule."""
        epoch, i = divmod(step, self.steps_per_epoch)
        return self.scales[self._order(epoch)[i]]

    def place(self, step: int) -> tuple[int, int, int]:
        """Return the epoch of `step`, and where its images begin and end in the epoch's order."""
        epoch, i = divmod(step, self.steps_per_epoch)
        sizes = [self.sizes[k] for k in self._order(epoch)]
        first = sum(sizes[:i])
        return epoch, first, first + sizes[i]

    def seen(self, step: int) -> int:
        """Return how many images there are in all steps before `step`."""
        epoch, first, _ = self.place(step)
        return epoch * self.rounds * sum(self.sizes) + first

    def _order(self, epoch: int) -> np.ndarray:
        """Return the number of the scale of each step in an epoch."""
        numbers = np.tile(np.arange(len(self.scales)), self.rounds)
        return np.random.default_rng((self.seed, 2, epoch)).permutation(numbers)
