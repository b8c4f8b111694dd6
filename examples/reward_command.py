"""A reward of one's own as a command: aha writes a line of JSON for every batch, and reads one line back.

Standard output is for answers alone; what goes to standard error is kept in the run's logs.
"""

import json
import sys


def reward(completion, columns):
    """What a completion is worth: 1 for the target, and less the more its last number is off."""
    digits = "".join(c if c in "0123456789" else " " for c in completion).split()
    if not digits:
        return {"outcome": "unparsable"}
    return 1.0 / (1.0 + abs(int(digits[-1][:9]) - int(columns["target"])))


def judge(item):
    try:
        return reward(item["completion"], item["columns"])
    except Exception as error:  # one that cannot be judged is no reason to lose its batch
        return {"outcome": "no_verdict", "message": repr(error)}


for line in sys.stdin:
    batch = json.loads(line)
    scores = [judge(item) for item in batch["completions"]]
    print(json.dumps({"id": batch["id"], "scores": scores}), flush=True)
