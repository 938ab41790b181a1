"""Samplers of the variance-exploding process, one family a file; all start at sigma_max and end by denoising sigma_min."""

from appa_lite.diffusion.samplers.ddim import DDIM
from appa_lite.diffusion.samplers.dlpm import DLPM
from appa_lite.diffusion.samplers.dpm_solver import DPMSolverPP2M, DPMSolverPP2S
from appa_lite.diffusion.samplers.exponential import ExponentialAdamsBashforth
from appa_lite.diffusion.samplers.heun import Heun
from appa_lite.diffusion.samplers.predictor_corrector import PredictorCorrector

__all__ = ["DDIM", "DLPM", "DPMSolverPP2M", "DPMSolverPP2S", "ExponentialAdamsBashforth", "Heun", "PredictorCorrector"]
