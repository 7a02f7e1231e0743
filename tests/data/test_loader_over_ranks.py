"""Two gloo processes read what one reads, count what one counts, and resume as one."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.models import ComposerModel
from composer.utils import dist

from recipe.config import LoaderConfig, RecipeConfig, TeacherConfig
from recipe.data.encode import Encoder
from recipe.data.loader import build_eval_loader, build_train_loader
from recipe.data.stream import read_teachers
from recipe.losses.counts import count_losses, split_batch
from recipe.schema import CountedBatch
from tests.launches.launch import run_composer

NUM_SAMPLES = 10
Seen = list[list[tuple[str, int, int]]]  # of each step: id, hash of the tokens, noise


class Recorder(ComposerModel):
    """Notes what it is fed; its loss is the count of the student's tokens."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[CountedBatch] = []

    def forward(self, batch: CountedBatch) -> torch.Tensor:
        self.seen.append(batch)
        return self.weight * 0

    def loss(self, outputs: torch.Tensor, batch: CountedBatch) -> torch.Tensor:
        counts = batch["loss_counts"]
        own = count_losses(batch)["student_tokens"] / counts["student_tokens"]
        return outputs.sum() + own * counts["microbatches"]


def row(batch: CountedBatch) -> list[tuple[str, int, int]]:
    pairs = zip(batch["samples"], batch["input_ids"].tolist(), batch["noise_seeds"], strict=True)
    return [(sample.id, hash(tuple(ids)), noise) for sample, ids, noise in pairs]


def make_config(stream: dict[str, str], pool: dict[str, str]) -> RecipeConfig:
    loader = LoaderConfig(streams={"train": stream}, global_batch_size=4, dataset={"shuffle": True})
    return RecipeConfig(
        seed=3,
        teachers=TeacherConfig(stream=pool, num_teachers=1, teacher_ratio=0.7),
        train_loader=loader,
        eval_loader=LoaderConfig(streams={"eval": stream}, global_batch_size=4),
    )


def train(config: RecipeConfig, encoder: Encoder, folder: Path, load_path: str | None) -> list[CountedBatch]:
    """Trains five steps through Composer, a microbatch a sample; returns this rank's microbatches."""
    model = Recorder()
    teachers = read_teachers(config.teachers, config.seed)
    trainer = Trainer(
        model=model,
        train_dataloader=build_train_loader(config.train_loader, encoder, teachers, config.seed, 1, split_batch),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        max_duration="5ba",
        device="cpu",
        device_train_microbatch_size=1,
        accumulate_train_batch_on_tokens=True,
        save_folder=str(folder),
        save_interval="1ba",
        save_filename="ba{batch}.pt",
        load_path=load_path,
        progress_bar=False,
    )
    trainer.fit()
    # The share of every microbatch adds to one, however the batch was cut and dealt.
    assert trainer.state.total_loss_dict["loss/train/total"] == pytest.approx(1.0)
    trainer.close()
    return model.seen


def one_rank(folder: str) -> None:
    dist.initialize_dist("cpu", timeout=60)
    encoder, stream, pool, load_paths = pickle.loads(Path(folder, "arguments.pickle").read_bytes())
    config = make_config(stream, pool)
    runs = [train(config, encoder, Path(folder) / f"run{i}", path) for i, path in enumerate(load_paths)]
    spec = build_eval_loader(config.eval_loader, encoder, read_teachers(config.teachers, config.seed), config.seed)
    scored = [
        (sample.id, sample.objects is not None)
        for batches in spec.dataloader
        for batch in batches
        for sample in batch["samples"]
    ]
    counts = [batch["loss_counts"] for batch in runs[0]]
    torch.save(
        ([[row(batch) for batch in seen] for seen in runs], counts, scored),
        Path(folder, f"{dist.get_global_rank()}.pt"),
    )
    torch.distributed.destroy_process_group()


def run(world_size: int, folder: Path, arguments: tuple[Any, ...]) -> list[tuple[list, list, list]]:
    folder.mkdir(exist_ok=True)
    (folder / "arguments.pickle").write_bytes(pickle.dumps(arguments))
    run_composer(world_size, __file__, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def steps(ranks: list[tuple[list, list, list]]) -> Seen:
    """The samples of the first two global steps, whichever rank read them."""
    each = 4 // len(ranks)
    return [
        sorted(item for runs, _, _ in ranks for batch in runs[0][start : start + each] for item in batch)
        for start in (0, each)
    ]


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_two_ranks_read_count_evaluate_and_resume_as_one(tmp_path: Path, encoder, make_sample, write_shards):
    stream = write_shards(tmp_path / "train", [make_sample(number, number % 3) for number in range(NUM_SAMPLES)])
    pool = write_shards(tmp_path / "pool", [make_sample(number) for number in (0, 1, 100, 101)])
    both = run(2, tmp_path / "both", (encoder, stream, pool, [None]))
    # Ten samples are two batches of four and one of two: 1 is inside an epoch, 3 at its end, 4 in the next.
    checkpoints = {f"{tmp_path}/both/run0/ba{batch}.pt": left for batch, left in ((1, 14), (3, 8), (4, 4))}
    (alone,) = run(1, tmp_path / "alone", (encoder, stream, pool, [None, *checkpoints]))

    assert steps(both) == steps([alone])
    everything = [item for batch in alone[0][0] for item in batch]
    assert sorted(item for runs, _, _ in both for batch in runs[0] for item in batch) == sorted(everything)
    assert alone[1][0] == both[0][1][0] == both[1][1][0]

    for ranks in ([alone], both):
        scored = [item for _, _, items in ranks for item in items]
        assert sorted(name for name, real in scored if real) == sorted(f"sample-{i}" for i in range(NUM_SAMPLES))
        assert len({len(items) for _, _, items in ranks}) == 1

    for resumed, left in zip(alone[0][1:], checkpoints.values(), strict=True):
        assert [item for batch in resumed for item in batch] == everything[-left:]


if __name__ == "__main__":
    one_rank(sys.argv[1])
