"""sail-eval: score a run zero-shot, with chance and a 95 % interval beside every number.

Evaluation sets are encoded once, with the run's own encoders, into features/eval/. Scores go to RUN/scores.json, a page
with pictures to RUN/report.html. Those of a named checkpoint go to RUN/scores/, those of an exported folder to runs/.
"""

from sail_align.evaluate.cli.demo import demo
from sail_align.evaluate.cli.elsewhere import clip_benchmark, mteb
from sail_align.evaluate.cli.read import compare, report, trace_scores
from sail_align.evaluate.cli.score import evaluate_all, task_command
from sail_align.evaluate.tasks.task import all_tasks
from sail_align.extract.system.command_line import GroupedCommand, make_app, run_command

app = make_app(__doc__)
app.command("all", cls=GroupedCommand)(evaluate_all)
for task in all_tasks().values():
    app.command(task.kind, cls=GroupedCommand, help=task.summary)(task_command(task))
passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("clip-benchmark", cls=GroupedCommand, context_settings=passed_on)(clip_benchmark)
app.command("demo", cls=GroupedCommand)(demo)
app.command("mteb", cls=GroupedCommand)(mteb)
app.command("report", cls=GroupedCommand)(report)
app.command("compare", cls=GroupedCommand)(compare)
app.command("trace", cls=GroupedCommand)(trace_scores)


def main() -> None:
    """Run the command line."""
    run_command(app)
