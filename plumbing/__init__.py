"""What must work and need not be read: everything around the algorithm, which stands beside train.py.

run            set-up, signals, what follows a step, the end
checkpoint     a run's state on the disk: atomic, checked, exact; its folder and lock
logbook        metrics.jsonl, samples.jsonl, TensorBoard, the terminal, warnings
config         YAML and overrides to settings
tasks          what a task file must define; splitting its problems
model_folder   Hugging Face folders, local or from the hub
memory         the memory plan, and limits that halve when memory runs out
ranks          several GPUs
terminal       lines, bars, one-line errors
"""
