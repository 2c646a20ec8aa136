"""latent_ddpm.launch: how many processes were asked for."""

import pytest
from conftest import ROOT

from latent_ddpm.launch import _processes_asked_for


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        ("accelerate launch --cpu --num_processes 2", 2),
        ("python -m accelerate.commands.launch --num-processes=3 --cpu", 3),
        ("accelerate launch", 1),
        (f"accelerate launch --config_file {ROOT}/configs/accelerate/two_cpu_processes.yaml", 2),
        (f"accelerate launch --config_file {ROOT}/configs/accelerate/one_process.yaml", 1),
        ("accelerate launch --config_file absent.yaml", 1),
        ("bash", 1),
    ],
)
def test_processes_asked_for(words, processes):
    assert _processes_asked_for(words.split()) == processes
