"""A reward of one's own as a gRPC service: python rewarder.py 127.0.0.1:7000

Needs grpcio-tools, which compiles proto/aha/v1/rewarder.proto when this starts.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

sys.path.append(str(Path(__file__).resolve().parent.parent / "proto"))
messages, services = grpc.protos_and_services("aha/v1/rewarder.proto")


def reward(completion, columns):
    """What a completion is worth: 1 for the target, and less the more its last number is off."""
    digits = "".join(c if c in "0123456789" else " " for c in completion).split()
    if not digits:
        return messages.ScoreResult(outcome=messages.SCORE_OUTCOME_UNPARSABLE)
    return messages.ScoreResult(score=1.0 / (1.0 + abs(int(digits[-1][:9]) - int(columns["target"]))))


def judge(item):
    try:
        return reward(item.completion, json.loads(item.columns))
    except Exception as error:  # one that cannot be judged is no reason to lose its batch
        return messages.ScoreResult(outcome=messages.SCORE_OUTCOME_NO_VERDICT, message=repr(error))


class Rewarder(services.RewarderServicer):
    def Score(self, request, context):
        return messages.ScoreBatchResponse(results=[judge(item) for item in request.items])


if __name__ == "__main__":
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    services.add_RewarderServicer_to_server(Rewarder(), server)
    server.add_insecure_port(sys.argv[1])
    server.start()
    print(f"judging at {sys.argv[1]}", flush=True)
    server.wait_for_termination()
