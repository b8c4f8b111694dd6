"""Log-probs that PEFT computes for the tokens on standard input, as JSON: check_peft.py MODEL_DIR ADAPTER_DIR"""

import json
import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, attn_implementation="eager")
model = PeftModel.from_pretrained(model, sys.argv[2]).eval()
ids = torch.tensor(json.load(sys.stdin))
with torch.no_grad():
    logits = model(ids[None]).logits[0].double()
print(json.dumps(logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].tolist()))
