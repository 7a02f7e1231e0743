"""The language loss: by hand, against Hugging Face's, split by role, and with nothing supervised."""

import math

import pytest
import torch
from loss_cases import COUNTS
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from recipe.losses.terms import language_losses
from recipe.models.token_losses import token_losses
from recipe.schema import LossCounts, Role

LN2 = math.log(2)


def test_by_hand():
    """Teacher tokens of ln 2 and ln 4 over 6, a student token of ln 4 over 4."""
    roles = torch.tensor([Role.TEACHER, Role.STUDENT, Role.TEACHER])
    counts: LossCounts = {**COUNTS, "teacher_tokens": 6, "student_tokens": 4}
    terms = language_losses(torch.tensor([LN2, 2 * LN2, 2 * LN2]), roles, counts)
    assert float(terms["loss_lm_teacher"]) == pytest.approx(3 * LN2 / 6)
    assert float(terms["loss_lm_student"]) == pytest.approx(2 * LN2 / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_hugging_face(dtype: torch.dtype):
    """Hugging Face shifts the labels of whole rows; we gather the positions before the language model's head."""
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 12, 8), (50, 8)))
    logits = states @ weight.T
    labels = torch.randint(0, 50, (2, 12), generator=generator)
    labels[:, :5] = -100
    labels[1, 9:] = -100
    index = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    counts: LossCounts = {**COUNTS, "student_tokens": float(len(index[0]))}
    roles = torch.full((len(index[0]),), int(Role.STUDENT))
    losses = token_losses(states[:, :-1][index], weight, labels[:, 1:][index], chunk=5)
    ours = language_losses(losses, roles, counts)["loss_lm_student"]
    theirs = ForCausalLMLoss(logits, labels, vocab_size=50)
    # measured: 1.0e-7
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_roles_are_apart():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 20, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 20, (9,), generator=generator)
    roles = torch.tensor([1, 2, 2, 1, 1, 2, 2, 2, 1])
    losses = F.cross_entropy(logits, labels, reduction="none")
    terms = language_losses(losses, roles, {**COUNTS, "teacher_tokens": 4, "student_tokens": 5})
    for name, role in (("loss_lm_teacher", Role.TEACHER), ("loss_lm_student", Role.STUDENT)):
        alone = F.cross_entropy(logits[roles == role], labels[roles == role])
        assert float(terms[name].detach()) == pytest.approx(float(alone.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(terms["loss_lm_teacher"], logits)
    assert not gradient[roles == Role.STUDENT].any() and gradient[roles == Role.TEACHER].any(1).all()


def test_nothing_supervised():
    losses = torch.zeros(0, requires_grad=True)
    terms = language_losses(
        losses, torch.zeros(0, dtype=torch.int64), {**COUNTS, "teacher_tokens": 0, "student_tokens": 0}
    )
    (terms["loss_lm_teacher"] + terms["loss_lm_student"]).backward()
    assert float(terms["loss_lm_teacher"].detach()) == float(terms["loss_lm_student"].detach()) == 0
    assert losses.grad is not None
