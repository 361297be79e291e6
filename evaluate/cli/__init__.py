"""sail-eval: score a run zero-shot, with chance and a 95 % interval beside every number.

Evaluation sets are encoded once, with the run's own encoders, into features/eval/. Scores go to RUN/scores.json, a page
with pictures to RUN/report.html. Those of a named checkpoint go to RUN/scores/, those of an exported folder to runs/.
"""

import typer

from sail_align.evaluate.cli.demo import demo
from sail_align.evaluate.cli.elsewhere import clip_benchmark
from sail_align.evaluate.cli.read import compare, report, trace_scores
from sail_align.evaluate.cli.score import evaluate_all, task_command
from sail_align.evaluate.tasks.task import all_tasks
from sail_align.extract.system.command_line import run_command

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.command("all")(evaluate_all)
for task in all_tasks().values():
    app.command(task.kind, help=task.summary)(task_command(task))
app.command("clip-benchmark", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    clip_benchmark
)
app.command()(demo)
app.command()(report)
app.command()(compare)
app.command("trace")(trace_scores)


def main() -> None:
    """Run the command line."""
    run_command(app)
