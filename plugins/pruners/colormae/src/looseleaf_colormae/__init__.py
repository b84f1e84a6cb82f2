"""ColorMAE: masks of filtered noise for masked autoencoders."""

from looseleaf_colormae.masking import Masking, attach_masking
from looseleaf_colormae.pictures import mask_statistics, masked, show, spectrum
from looseleaf_colormae.pruner import COLORS, ColorMAE, MaskIds, color_gain, filtered, gaussian_gain, patch_grid

__version__ = "0.1.0"
__all__ = ["COLORS", "ColorMAE", "MaskIds", "Masking", "attach_masking", "color_gain", "filtered", "gaussian_gain",
           "mask_statistics", "masked", "patch_grid", "show", "spectrum"]
