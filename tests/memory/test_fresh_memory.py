"""The instrument that asks what a memory without training holds."""

import pytest
import torch

from benchmarks.fresh_memory import read_share


@pytest.mark.parametrize("strength", [0.0, 3.0])
def test_a_colour_that_psi_holds_is_read_and_one_that_it_does_not_hold_is_guessed(strength):
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(6, (400,), generator=generator)
    directions = torch.randn(6, 3 * 16, generator=generator)
    psi = torch.randn(400, 3 * 16, generator=generator) + strength * directions[colours]
    share = read_share(psi.reshape(400, 3, 16), colours, 300)
    assert share == 1 if strength else 0.08 < share < 0.3  # 1 in 6 by chance


def test_only_the_scenes_it_was_fitted_on_teach_it():
    """Colours that mean one thing in the first scenes and another in the last are read wrong there."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randint(6, (400,), generator=generator)
    shown = torch.cat([colours[:300], (colours[300:] + 1) % 6])
    psi = torch.nn.functional.one_hot(shown, 6).float()[:, None]
    assert read_share(psi, colours, 300) == 0
