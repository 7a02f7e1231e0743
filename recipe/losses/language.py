"""The language model's loss: cross-entropy on the answers, separate for teachers and student."""

import torch
from torch import Tensor
from torch.nn import functional as F

from recipe.schema import LossCounts, Role


def language_losses(logits: Tensor, labels: Tensor, roles: Tensor, counts: LossCounts) -> dict[str, Tensor]:
    """Return each role's summed cross-entropy, divided by the role's tokens in the whole global batch.

    `logits` (K, V), `labels` (K,) and `roles` (K,) of `Role` are of the supervised positions only.
    """
    nll = F.cross_entropy(logits.float() if logits.dtype != torch.float64 else logits, labels, reduction="none")
    sums = nll.new_zeros(len(Role)).index_add(0, roles, nll)
    return {
        "loss_lm_teacher": sums[Role.TEACHER] / max(counts["teacher_tokens"], 1),
        "loss_lm_student": sums[Role.STUDENT] / max(counts["student_tokens"], 1),
    }
