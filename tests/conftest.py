"""Shared by all tests: two threads of torch at most, and reproducible property tests."""

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(min(2, os.cpu_count() or 1))
settings.register_profile("repo", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("repo")
