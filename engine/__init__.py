"""How a run lives.

flags.py             the flags of train.py, and those that evaluate.py shares
evaluation_flags.py  those of evaluate.py alone
execution.py         how a device computes: memory layout, precision, compilation
optimization.py      the optimizer and its learning rate
averaging.py         the moving average of a model's weights
training_state.py    what training changes, and one step of it
loading.py           loader processes: how they start, what they survive, how they end
checkpoints.py       how checkpoints reach the disk, which of them is sound, which model one holds
resuming.py          what a run may continue from, what it may change, whose folder it writes to
inference.py         detecting on every image once, whatever the number of processes
exported.py          exported files as detectors
journal.py           what was found in the images of a folder, so that a run goes on where another was stopped
collapse.py          whether a model says the same of every image
validation.py        evaluation within a run, beside the next epoch
stopping.py          how a run ends early, on all processes alike, for the reasons of the next two
interruption.py      signals and the clock
divergence.py        numbers that are not finite
failures.py          what a run says when it ends early, and its exit codes
output.py            a console that cannot fail, and a folder that is tried before anything is computed
run.py               when a run evaluates, saves and ends
summary.py           what a run says about itself when it begins
progress.py          a bar on a terminal
json_lines.py        files of a json object per line
run_log.py           console, ``metrics.jsonl``, TensorBoard
check_data.py        ``--check-data``: all faults of a data set at once
"""
