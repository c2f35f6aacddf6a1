"""Random views of images and of vectors, and the edges of images.

The draws are made on the CPU, one call a batch, whatever the device: every device sees the same
numbers. Each row or image has parameters of its own.
"""

import math
import numbers
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from deepmix._torch import full_precision

# ITU-R BT.601: the share of red, green and blue in the brightness that the eye sees.
LUMA = (0.299, 0.587, 0.114)

# The chroma axes I and Q of YIQ; their rows sum to zero, so that gray has none.
CHROMA = ((0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))

SOBEL = (((1, 0, -1), (2, 0, -2), (1, 0, -1)), ((1, 2, 1), (0, 0, 0), (-1, -2, -1)))

# --- Fixed filters ---------------------------------------------------------------------


def grayscale(images):
    """Brightness of an image by the weights of ITU-R BT.601.

    Parameters
    ----------
    images : Tensor of shape (B, 3, height, width) or (B, 1, height, width)
        Red, green, blue; or gray, which stays as it is.

    Returns
    -------
    Tensor of shape (B, 1, height, width)
    """
    _refuse_other_channels(images, (1, 3), "Give gray or RGB images")
    if images.shape[1] == 1:
        return images
    return sum(weight * images[:, c : c + 1] for c, weight in enumerate(LUMA))


def sobel(images):
    """Vertical and horizontal edges by the two 3x3 Sobel kernels, unscaled, zeros around.

    Parameters
    ----------
    images : Tensor of shape (B, 1, height, width)

    Returns
    -------
    Tensor of shape (B, 2, height, width)
    """
    _refuse_other_channels(images, (1,), "Apply grayscale first")
    kernels = _like(torch.tensor(SOBEL), images).unsqueeze(1)
    return F.conv2d(images, kernels, padding=1)


# --- Geometry --------------------------------------------------------------------------


def affine_matrix(size, angle, zoom, shear, shift, keep, centre, mirror):
    r"""Matrices that map each point of a view to a point of its image, one for each image.

    The image is cropped, mirrored, sheared by :math:`K`, zoomed by :math:`s`, turned by
    :math:`R` and shifted by :math:`d`. In pixels from the middle, :math:`S` the half sides,

    .. math:: x_\text{image} = k\, M K^{-1} R^{-1} (x_\text{view} - 2 S d) / s + (1 - k)\, S' c

    with :math:`S'` half a pixel less than :math:`S`, so that a crop ends at the middle of the last
    pixel; given in units of the half sides, as `torch.nn.functional.affine_grid` needs it.
    A rotation of an image that is not square is a rotation of its pixels, hence the aspect ratio.

    Parameters
    ----------
    size : (int, int)
        Height and width.
    angle : Tensor of shape (B,)
        Radians; a positive one turns the first axis (right) toward the second (down).
    zoom : Tensor of shape (B,)
        Magnification: above 1 enlarges what the image shows.
    shear : Tensor of shape (B,)
        Angle of shear along the rows, in radians.
    shift : Tensor of shape (B, 2)
        Shift to the right and down, as fractions of the width and the height.
    keep : Tensor of shape (B,)
        Fraction of the sides that the crop keeps.
    centre : Tensor of shape (B, 2)
        Where the crop lies: -1 at the left (top) border, 1 at the right (bottom) border.
    mirror : Tensor of shape (B,)
        -1 swaps left and right, 1 does not.

    Returns
    -------
    Tensor of shape (B, 2, 3)
    """
    height, width = size
    cos, sin, tan = angle.cos(), angle.sin(), shear.tan()
    right = torch.stack([cos + tan * sin, (sin - tan * cos) * height / width], dim=1)
    down = torch.stack([-sin * width / height, cos], dim=1)
    linear = torch.stack([mirror[:, None] * right, down], dim=1) * (keep / zoom)[:, None, None]
    # Samples half a pixel further out would mix in the zeros around the image.
    reach = 1 - 1 / torch.tensor([width, height], dtype=angle.dtype, device=angle.device)
    offset = (1 - keep)[:, None] * reach * centre
    # (B, 2, 2) @ (B, 2, 1)
    offset = offset - (linear @ (2 * shift)[:, :, None]).squeeze(2)
    return torch.cat([linear, offset[:, :, None]], dim=2)


def warp(images, matrix):
    """Sample images at the points of `affine_matrix`: bilinear, zeros around.

    Parameters
    ----------
    images : Tensor of shape (B, channels, height, width)
    matrix : Tensor of shape (B, 2, 3)

    Returns
    -------
    Tensor of shape (B, channels, height, width)
    """
    grid = F.affine_grid(matrix, images.shape, align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


# --- Colour ----------------------------------------------------------------------------


def adjust_light(images, contrast, brightness):
    r"""Scale the contrast about each image's own mean, then the brightness.

    .. math:: b \, (\bar x + c \, (x - \bar x))

    Parameters
    ----------
    images : Tensor of shape (B, channels, height, width)
    contrast, brightness : Tensor of shape (B,)

    Returns
    -------
    Tensor of shape (B, channels, height, width)
    """
    mean = images.mean(dim=(1, 2, 3))
    gain, offset = brightness * contrast, brightness * (1 - contrast) * mean
    return torch.addcmul(offset.view(-1, 1, 1, 1), images, gain.view(-1, 1, 1, 1))


def chroma_matrix(saturation, hue):
    r"""Matrices that scale and turn the chroma plane of YIQ.

    .. math:: G + s \, (\cos\theta \, (I - G) + \sin\theta \, J)

    :math:`G` takes a pixel to its gray and :math:`J` turns its chroma by a quarter. With
    :math:`\theta = 0` this is a blend with the gray image; with :math:`s = 1` a rotation of the
    hue that keeps the brightness and, unlike one in HSV, is linear: one product an image.

    Parameters
    ----------
    saturation : Tensor of shape (B,)
    hue : Tensor of shape (B,)
        Radians.

    Returns
    -------
    Tensor of shape (B, 3, 3)
    """
    yiq = torch.tensor((LUMA, *CHROMA), dtype=saturation.dtype, device=saturation.device)
    back = torch.linalg.inv(yiq)
    gray = back[:, :1] @ yiq[:1]
    keep = back[:, 1:] @ yiq[1:]
    turn = back[:, 2:] @ yiq[1:2] - back[:, 1:2] @ yiq[2:]
    cos, sin = (saturation * hue.cos())[:, None, None], (saturation * hue.sin())[:, None, None]
    return gray + cos * keep + sin * turn


def mix_channels(images, matrix):
    """Multiply every pixel by its image's matrix.

    Parameters
    ----------
    images : Tensor of shape (B, channels, height, width)
    matrix : Tensor of shape (B, channels, channels)

    Returns
    -------
    Tensor of shape (B, channels, height, width)
    """
    return torch.bmm(matrix, images.flatten(2)).view(images.shape)


# --- Views of images -------------------------------------------------------------------

# Names of the columns of random numbers that `ImageAugmentation.apply` takes.
IMAGE_DRAWS = (
    "rotation",
    "scale",
    "shift_x",
    "shift_y",
    "crop",
    "crop_x",
    "crop_y",
    "shear",
    "flip",
    "contrast",
    "brightness",
    "saturation",
    "hue",
)

# Allowed interval of each strength; a round bracket excludes the end.
IMAGE_RANGES = {
    "rotation": ("[", 0, 180, "]"),
    "scale": ("[", 0, 1, ")"),
    "shift": ("[", 0, 1, "]"),
    "crop": ("(", 0, 1, "]"),
    "shear": ("[", 0, 90, ")"),
    "brightness": ("[", 0, 1, "]"),
    "contrast": ("[", 0, 1, "]"),
    "saturation": ("[", 0, 1, "]"),
    "hue": ("[", 0, 0.5, "]"),
}


@dataclass(frozen=True)
class ImageAugmentation:
    """Random views of images: one affine map, then light and colour.

    Every strength bounds a number drawn uniformly for each image; the defaults leave the images
    as they are.

    Parameters
    ----------
    rotation : float, default=0.0
        Largest angle, in degrees, to either side.
    scale : float, default=0.0
        The zoom lies between ``1 - scale`` and ``1 + scale``.
    shift : float, default=0.0
        Largest shift, as a fraction of the width and of the height.
    crop : float, default=1.0
        Smallest fraction of the sides that a random crop keeps; it is resized back, so that it
        zooms in about a random point. 1 is no crop.
    shear : float, default=0.0
        Largest angle of shear along the rows, in degrees.
    brightness : float, default=0.0
        Images are multiplied by a number between ``1 - brightness`` and ``1 + brightness``.
    contrast : float, default=0.0
        Differences from an image's own mean are multiplied by a number between ``1 - contrast``
        and ``1 + contrast``.
    saturation : float, default=0.0
        Differences from the gray image are multiplied by a number between ``1 - saturation`` and
        ``1 + saturation``; three channels only.
    hue : float, default=0.0
        Largest rotation of the hue, as a fraction of the full circle; three channels only.
    flip : bool, default=False
        Swap left and right with probability one half.

    Examples
    --------
    >>> import torch
    >>> from deepmix.augmentation import ImageAugmentation
    >>> views = ImageAugmentation(rotation=10, shift=0.1, contrast=0.2)
    >>> generator = torch.Generator().manual_seed(0)
    >>> images = torch.rand(5, 1, 8, 8, generator=generator)
    >>> views(images, generator).shape
    torch.Size([5, 1, 8, 8])
    """

    rotation: float = 0.0
    scale: float = 0.0
    shift: float = 0.0
    crop: float = 1.0
    shear: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    flip: bool = False

    def __post_init__(self):
        _refuse_bad_strengths(self, IMAGE_RANGES)
        if self.flip not in (False, True):
            raise ValueError(f"flip must be a bool; got {self.flip!r}. Use True or False.")

    def __call__(self, images, generator):
        """Views of a batch: (B, channels, height, width) -> the same.

        Images are floats in [0, 1]; three channels are red, green, blue. The generator is one
        of the CPU.
        """
        _refuse_bad_generator(generator)
        # All columns are drawn, needed or not: every choice of strengths sees the same numbers.
        shape = len(images), len(IMAGE_DRAWS)
        draws = torch.rand(shape, generator=generator, dtype=torch.float32)
        return self.apply(images, 2 * draws - 1)

    def apply(self, images, draws):
        """Views by given draws of shape (B, 13): uniform in [-1, 1), ordered as IMAGE_DRAWS."""
        if images.dim() != 4:
            raise ValueError(
                "images must have shape (B, channels, height, width); got "
                f"{tuple(images.shape)}. Reshape the rows first."
            )
        # The small numbers stay on the CPU, in float64; only finished matrices go to the device.
        draw = dict(zip(IMAGE_DRAWS, draws.double().unbind(dim=1), strict=True))
        with full_precision(images.device):  # bfloat16 cannot tell neighbouring pixels apart
            if self._moves():
                matrix = self._geometry(draw, images.shape[2:])
                images = warp(images, _like(matrix, images))
            if self.contrast or self.brightness:
                contrast = _like(1 + self.contrast * draw["contrast"], images)
                brightness = _like(1 + self.brightness * draw["brightness"], images)
                images = adjust_light(images, contrast, brightness)
            if images.shape[1] == 3 and (self.saturation or self.hue):
                saturation = 1 + self.saturation * draw["saturation"]
                matrix = chroma_matrix(saturation, 2 * math.pi * self.hue * draw["hue"])
                images = mix_channels(images, _like(matrix, images))
        return images.clamp(0, 1)

    def _moves(self):
        strengths = self.rotation, self.scale, self.shift, self.shear, self.flip
        return any(strengths) or self.crop < 1

    def _geometry(self, draw, size):
        shift = torch.stack([draw["shift_x"], draw["shift_y"]], dim=1)
        ones = torch.ones_like(draw["flip"])
        return affine_matrix(
            size,
            angle=math.radians(self.rotation) * draw["rotation"],
            zoom=1 + self.scale * draw["scale"],
            shear=math.radians(self.shear) * draw["shear"],
            shift=self.shift * shift,
            keep=1 - (1 - self.crop) * (1 + draw["crop"]) / 2,
            centre=torch.stack([draw["crop_x"], draw["crop_y"]], dim=1),
            mirror=torch.where(draw["flip"] < 0, -ones, ones) if self.flip else ones,
        )


# --- Views of vectors ------------------------------------------------------------------


def nearest_other(rows):
    """The nearest other row of the batch, for each row; a single row is its own neighbour.

    Parameters
    ----------
    rows : Tensor of shape (B, n_features)

    Returns
    -------
    Tensor of shape (B, n_features)
    """
    # A matrix of B x B. The order of near ties does not matter, so cdist may use a product.
    distances = torch.cdist(rows, rows).fill_diagonal_(math.inf)
    return rows[distances.argmin(dim=1)]


VECTOR_RANGES = {
    "noise": ("[", 0, math.inf, ")"),
    "masking": ("[", 0, 1, "]"),
    "mixup": ("[", 0, 1, "]"),
}


@dataclass(frozen=True)
class VectorAugmentation:
    """Random views of standardised vectors: toward a neighbour, noise, then masks.

    The defaults leave the rows as they are.

    Parameters
    ----------
    noise : float, default=0.0
        Standard deviation of Gaussian noise, in units of the features.
    masking : float, default=0.0
        Probability that a feature of a row is replaced by zero, its mean.
    mixup : float, default=0.0
        Largest share of the way to the nearest other row of the batch; the share is uniform
        between 0 and this.

    Examples
    --------
    >>> import torch
    >>> from deepmix.augmentation import VectorAugmentation
    >>> views = VectorAugmentation(noise=0.1, masking=0.2)
    >>> generator = torch.Generator().manual_seed(0)
    >>> rows = torch.randn(5, 3, generator=generator)
    >>> views(rows, generator).shape
    torch.Size([5, 3])
    """

    noise: float = 0.0
    masking: float = 0.0
    mixup: float = 0.0

    def __post_init__(self):
        _refuse_bad_strengths(self, VECTOR_RANGES)

    def __call__(self, rows, generator):
        """Views of a batch: (B, n_features) -> (B, n_features). The generator is one of the CPU."""
        _refuse_bad_generator(generator)
        shape = len(rows), sum(self._columns(rows))
        # Drawn in float32 for rows of any dtype, so that all see the same numbers.
        return self.apply(rows, torch.randn(shape, generator=generator, dtype=torch.float32))

    def apply(self, rows, draws):
        """Views by given standard normal draws of shape (B, n_draws).

        One column for mixup, n_features for noise and n_features for masking, each only if its
        strength is positive.
        """
        share, noise, mask = _like(draws, rows).split(self._columns(rows), dim=1)
        if self.mixup:
            # The distribution function makes a normal number a uniform one.
            share = self.mixup * torch.special.ndtr(share)
            rows = rows + share * (nearest_other(rows) - rows)
        if self.noise:
            rows = rows + self.noise * noise
        if self.masking:
            quantile = torch.special.ndtri(torch.tensor(self.masking, dtype=torch.float64))
            rows = rows.masked_fill(mask < float(quantile), 0)
        return rows

    def _columns(self, rows):
        d = rows.shape[1]
        return [int(self.mixup > 0), d * (self.noise > 0), d * (self.masking > 0)]


# --- Input -----------------------------------------------------------------------------


def _refuse_bad_strengths(augmentation, ranges):
    for name, (left, low, high, right) in ranges.items():
        value = getattr(augmentation, name)
        number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        inside = number and low <= value <= high
        if not inside or (left == "(" and value == low) or (right == ")" and value == high):
            raise ValueError(
                f"{name} must be a number in {left}{low}, {high}{right}; got {value!r}. "
                f"The default, {getattr(type(augmentation), name)}, leaves it out."
            )


def _refuse_bad_generator(generator):
    # Torch would take None for its global generator.
    if not isinstance(generator, torch.Generator) or generator.device.type != "cpu":
        raise ValueError(
            f"generator must be a torch.Generator on the CPU; got {generator!r}. Use "
            "torch.Generator().manual_seed(0); its draws serve every device."
        )


def _refuse_other_channels(images, channels, remedy):
    if images.dim() != 4 or images.shape[1] not in channels:
        counts = " or ".join(map(str, channels))
        raise ValueError(
            f"images must have shape (B, {counts}, height, width); got {tuple(images.shape)}. "
            f"{remedy}."
        )


def _like(tensor, other):
    # On CUDA the CPU need not wait: ordinary memory is copied to a buffer before the call returns.
    return tensor.to(other.dtype).to(other.device, non_blocking=other.is_cuda)


# --- Named strengths -------------------------------------------------------------------

# On MNIST weak views left one run of three in a poorer optimum, medium ones none; on a small part
# of it strong ones cost twenty points of accuracy. The colour strengths of 'medium' are those of
# IIC (Ji et al., 2019). Images are not flipped: a mirrored digit is no digit.
IMAGE_AUGMENTATIONS = {
    "weak": ImageAugmentation(
        rotation=10, scale=0.1, shift=0.07, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.06
    ),
    "medium": ImageAugmentation(
        rotation=25, scale=0.2, shift=0.1, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.125
    ),
    "strong": ImageAugmentation(
        rotation=40, scale=0.4, shift=0.2, brightness=0.6, contrast=0.6, saturation=0.6, hue=0.2
    ),
}

# Photographs are flipped and cropped as well; as in IIC, a crop keeps two thirds of the sides.
IMAGE_AUGMENTATIONS["natural"] = replace(IMAGE_AUGMENTATIONS["medium"], flip=True, crop=0.67)

VECTOR_AUGMENTATIONS = {
    "noise": VectorAugmentation(noise=0.1),
    "masking": VectorAugmentation(masking=0.1),
    "mixup": VectorAugmentation(mixup=0.5),
}
