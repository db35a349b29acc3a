"""The factor of GPTQ: torch's where that fits, and the same in the Hessian's own memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from quantizer_examples import correlated_hessian
from torch import Tensor

from rilq.converter.quantizers import inverse_factor as module
from rilq.converter.quantizers.inverse_factor import factor_bytes, inverse_factor
from rilq.errors import RilqError


def refuse(text: str) -> None:
    raise AssertionError(text)


@pytest.fixture(params=["at once", "by blocks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either way of factoring, whatever the width."""
    if request.param == "by blocks":
        monkeypatch.setattr(module, "AT_ONCE", 0)
        monkeypatch.setattr(module, "BLOCK", 12)
    return str(request.param)


def reference(hessian: Tensor, damping: float) -> Tensor:
    """By way of the inverse, in float64."""
    damped = hessian.double() / hessian.diagonal().mean() + damping * torch.eye(len(hessian))
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


# Below one block, whole blocks, and ends of another length.
@pytest.mark.parametrize("width", [1, 8, 12, 24, 48, 50, 131])
def test_it_is_the_cholesky_factor_of_the_damped_inverse(width: int, way: str) -> None:
    x = correlated_hessian(width, tokens=20) if width >= 8 else torch.ones(1, 1)  # singular
    factor = inverse_factor(x.clone(), 0.01, refuse)
    torch.testing.assert_close(factor.double(), reference(x, 0.01), rtol=1e-3, atol=1e-4)
    assert torch.equal(factor, factor.triu())


def test_blocks_of_a_thousand_columns_give_what_torch_gives_at_once() -> None:
    hessian = correlated_hessian(1300, tokens=1500)
    expected = inverse_factor(hessian.clone(), 0.01, refuse)
    hessian /= hessian.diagonal().mean()
    blocks = module._Blocks(hessian, module.BLOCK).inverse_factor(0.01)
    assert blocks is hessian  # in the memory that was given away
    torch.testing.assert_close(blocks, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("place", [0, 20, 30])  # in the block that comes last, between, first
def test_damping_is_raised_until_the_hessian_is_positive_definite_and_said(
    place: int, way: str
) -> None:
    hessian = torch.eye(32)
    # Eigenvalue -0.05: more than 1 %, less than 10 %.
    hessian[place, place + 1] = hessian[place + 1, place] = 1.05
    hessian[3, 31] = hessian[31, 3] = 0.2  # in another block
    warnings: list[str] = []
    factor = inverse_factor(hessian.clone(), 0.01, warnings.append)
    torch.testing.assert_close(factor.double(), reference(hessian, 0.1), rtol=1e-4, atol=1e-4)
    assert len(warnings) == 1 and "with 0.01 of" in warnings[0] and "0.1 was used" in warnings[0]


def test_a_singular_hessian_without_much_damping_is_damped_more_and_said(way: str) -> None:
    hessian = correlated_hessian(96, tokens=5)
    warnings: list[str] = []
    inverse_factor(hessian.clone(), 1e-12, warnings.append)
    assert "the Hessian is not positive definite with 1e-12" in "".join(warnings)


@pytest.mark.parametrize(("diagonal", "off_diagonal"), [(3.0, 30.0), (-1.0, 0.0)])
def test_a_hessian_that_is_no_sum_of_squares_is_refused(
    diagonal: float, off_diagonal: float, way: str
) -> None:
    hessian = diagonal * torch.eye(32)
    hessian[0, 1] = hessian[1, 0] = off_diagonal
    with pytest.raises(RilqError, match=r"Hessian \[32, 32\]: not positive definite"):
        inverse_factor(hessian, 0.01, refuse)


PEAK = """
import sys
from pathlib import Path
import torch
from rilq.converter.quantizers import inverse_factor as module

def status(key):
    return int(Path("/proc/self/status").read_text().partition(key)[2].split()[0]) * 1024

def hessian(width):
    made = torch.full((width, width), 0.5)
    made.diagonal().fill_(1)
    return made

module.AT_ONCE, module.BLOCK, width = map(int, sys.argv[1:])
module.inverse_factor(hessian(600), 0.01, print)  # libraries take what they keep
given = hessian(width)
before = status("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")  # the peak is that of now
module.inverse_factor(given, 0.01, print)
print(status("VmHWM:") - before + given.nbytes, module.factor_bytes(width))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("at_once", "block", "copies"), [(8192, 1024, 4), (0, 256, 1.25)])
def test_peak_memory_at_4096_features_is_what_the_plan_counts(
    at_once: int, block: int, copies: float
) -> None:
    command = [sys.executable, "-c", PEAK, str(at_once), str(block), "4096"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    peak, counted = map(int, out.split())
    assert counted == copies * 4 * 4096**2
    assert 0.8 * counted < peak < counted + (8 << 20)  # and pages that the allocator keeps


def test_a_wide_hessian_is_counted_little_more_than_once() -> None:
    assert factor_bytes(28672) == pytest.approx(1.143 * 4 * 28672**2, rel=0.01)
