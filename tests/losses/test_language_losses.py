"""The language loss: by hand, against Hugging Face's, split by role, and with nothing supervised."""

import math

import pytest
import torch
from loss_cases import COUNTS
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from recipe.losses.terms import language_losses
from recipe.schema import LossCounts, Role

LN2 = math.log(2)


def test_by_hand():
    """Teacher tokens of ln 2 and ln 4 over 6, a student token of ln 4 over 4."""
    logits = torch.tensor([[0.0, 0.0, -math.inf, -math.inf], [0.0] * 4, [0.0] * 4])
    roles = torch.tensor([Role.TEACHER, Role.STUDENT, Role.TEACHER])
    terms = language_losses(
        logits, torch.tensor([1, 3, 0]), roles, {**COUNTS, "teacher_tokens": 6, "student_tokens": 4}
    )
    assert float(terms["loss_lm_teacher"]) == pytest.approx(3 * LN2 / 6)
    assert float(terms["loss_lm_student"]) == pytest.approx(2 * LN2 / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_with_hugging_face(dtype: torch.dtype):
    """Hugging Face shifts the labels of whole rows; we gather the positions before the language model's head."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 12, 50, generator=generator).to(dtype)
    labels = torch.randint(0, 50, (2, 12), generator=generator)
    labels[:, :5] = -100
    labels[1, 9:] = -100
    index = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    counts: LossCounts = {**COUNTS, "student_tokens": float(len(index[0]))}
    roles = torch.full((len(index[0]),), int(Role.STUDENT))
    ours = language_losses(logits[:, :-1][index], labels[:, 1:][index], roles, counts)["loss_lm_student"]
    theirs = ForCausalLMLoss(logits, labels, vocab_size=50)
    # measured: 1.0e-7
    assert float(ours) == pytest.approx(float(theirs), rel=1e-6)


def test_roles_are_apart():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, 20, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(0, 20, (9,), generator=generator)
    roles = torch.tensor([1, 2, 2, 1, 1, 2, 2, 2, 1])
    terms = language_losses(logits, labels, roles, {**COUNTS, "teacher_tokens": 4, "student_tokens": 5})
    for name, role in (("loss_lm_teacher", Role.TEACHER), ("loss_lm_student", Role.STUDENT)):
        alone = F.cross_entropy(logits[roles == role], labels[roles == role])
        assert float(terms[name].detach()) == pytest.approx(float(alone.detach()), rel=1e-12)
    (gradient,) = torch.autograd.grad(terms["loss_lm_teacher"], logits)
    assert not gradient[roles == Role.STUDENT].any() and gradient[roles == Role.TEACHER].any(1).all()


def test_nothing_supervised():
    logits = torch.zeros(0, 20, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.int64)
    terms = language_losses(logits, empty, empty, {**COUNTS, "teacher_tokens": 0, "student_tokens": 0})
    (terms["loss_lm_teacher"] + terms["loss_lm_student"]).backward()
    assert float(terms["loss_lm_teacher"].detach()) == float(terms["loss_lm_student"].detach()) == 0
    assert logits.grad is not None
