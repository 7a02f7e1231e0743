"""Measure what an evaluation of a training run costs per image, by part, next to one that leaves nothing out.

    python tests/benchmarks/evaluation_cost.py YAML CHECKPOINT [--other TREE] [--answers N] [--repeats 5]

One process measures four kinds in turn, after a pass of each that is not counted. They are the last evaluation of a run
(all text answers, the captions of all objects, scores by category and their tables), one before it (N answers, captions
that scores read), and the same two without answers. `--other` is the folder of another checkout in which
`evaluation.generate_answer` still exists. Its evaluation with and without answers is measured in processes of its own,
in turn with those of this one. A YAML may be of either. Times are CPU time of one thread, which other work on the
machine does not lengthen much; the median of the repeats counts. Nothing is drawn. The last line is JSON: milliseconds
per image by kind of evaluation and part.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("total", "forward", "captions", "answers", "scoring", "data")
Row = dict[str, float]


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("yaml", type=Path)
    parser.add_argument("checkpoint")
    parser.add_argument("--other", type=Path, help="another checkout")
    parser.add_argument("--answers", type=int, default=64, help="evaluation.answers.images")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--is-child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(evaluate: Callable[[], None], seconds: Callable[[], Row], num_images: int) -> Row:
    """Return the CPU milliseconds per image of one evaluation."""
    start = time.process_time()
    evaluate()
    total = time.process_time() - start
    return {name: 1000 * value / num_images for name, value in {"total": total, **seconds()}.items()}


def child(args: argparse.Namespace) -> None:
    """Measure in the tree that is imported; print a JSON object: one row by kind of evaluation."""
    import torch
    from composer import Trainer

    from recipe import joint
    from recipe.config import EvaluationConfig
    from recipe.configure import load_config
    from recipe.eval import main as evaluate

    torch.set_num_threads(1)
    is_other = hasattr(EvaluationConfig, "generate_answer")
    with TemporaryDirectory() as folder:
        config = load_config(str(args.yaml), [f"load_path={args.checkpoint}", f"run_folder={folder}"])
        config.loggers, config.evaluation.num_logged_images = {}, 0
        config.train_loader.dataloader, config.eval_loader.dataloader = {}, {}
        original, rows = Trainer.eval, dict[str, Row]()

        def all_kinds(trainer: Any) -> None:
            (evaluator,) = trainer.state.evaluators
            num_images = evaluator.dataloader.num_samples
            kinds: dict[str, Callable[[], Row]] = {}

            def other(with_answers: bool) -> Row:
                trainer.state.model.evaluation.generate_answer = with_answers
                return measure(lambda: original(trainer), dict, num_images)

            def own(with_answers: bool, is_last: bool) -> Row:
                from recipe.callbacks.evaluation_parts import EvaluationParts, evaluation_of
                from recipe.config import AnswersConfig
                from recipe.data.evaluation import put_answered_first

                model, source = trainer.state.model, evaluation_of(trainer.state)
                (parts,) = (callback for callback in trainer.state.callbacks if isinstance(callback, EvaluationParts))
                answers = AnswersConfig(args.answers) if with_answers else None
                model.evaluation.answers = answers
                model.scope.last_answered = None if is_last else put_answered_first(evaluator.dataloader, answers)
                model.scope.with_categories = source.with_categories = parts._with_tables = is_last
                for entry in trainer.state.eval_metrics["eval"].values():
                    is_kept = is_last or entry.key not in source.category_names
                    entry.compute = entry_compute[entry.key] if is_kept else lambda: torch.tensor(0.0)
                return measure(lambda: original(trainer), lambda: parts.seconds, num_images)

            if is_other:
                kinds = {f"other, {name}": lambda a=a: other(a) for name, a in (("all answers", True), ("none", False))}
            else:
                joint.perf_counter = time.process_time
                entry_compute = {name: entry.compute for name, entry in trainer.state.eval_metrics["eval"].items()}
                kinds = {
                    "last, all answers": lambda: own(True, True),
                    f"{args.answers} answers": lambda: own(True, False),
                    "last, none": lambda: own(False, True),
                    "none": lambda: own(False, False),
                }
            for kind, run in kinds.items():
                rows[kind] = run()
            original(trainer)  # whole again, for what eval.py reports

        setattr(Trainer, "eval", all_kinds)  # noqa: B010
        evaluate(config)
    print("ROWS " + json.dumps(rows))


def main() -> None:
    """Measure and report."""
    args = parse()
    if args.is_child:
        child(args)
        return
    section = yaml.safe_load(args.yaml.read_text())
    section.get("evaluation", {}).pop("generate_answer", None)
    section.get("evaluation", {}).pop("answers", None)
    rows: dict[str, list[Row]] = {}
    with TemporaryDirectory() as folder:
        path = Path(folder, "run.yaml")
        path.write_text(yaml.safe_dump(section))
        for repeat in range(args.repeats + 1):
            for tree in (ROOT, args.other):
                if tree is None:
                    continue
                command = [sys.executable, __file__, str(path), args.checkpoint, f"--answers={args.answers}"]
                environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
                done = subprocess.run(
                    [*command, "--is-child"], env=environment, check=True, text=True, stdout=subprocess.PIPE
                )
                (line,) = (line for line in done.stdout.splitlines() if line.startswith("ROWS "))
                for kind, row in json.loads(line.removeprefix("ROWS ")).items():
                    rows.setdefault(kind, []).extend([row] if repeat else [])
    medians = {
        kind: {part: round(median(row.get(part, 0.0) for row in found), 1) for part in PARTS}
        for kind, found in rows.items()
    }
    print(f"| CPU ms per image | {' | '.join(PARTS)} |\n| --- |{' ---: |' * len(PARTS)}")
    for kind, row in medians.items():
        print(f"| {kind} | {' | '.join(format(value, '.1f') for value in row.values())} |")
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
