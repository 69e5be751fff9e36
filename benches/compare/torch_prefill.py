"""Speed of transformers on the CPU, prefill only: tokens a second for each length, as JSON.

    python torch_prefill.py MODEL_FOLDER THREADS REPEATS LENGTH...
"""

import json
import statistics
import sys
import time

import torch
import transformers


def main(folder, threads, repeats, lengths):
    torch.set_num_threads(threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    rates = {}
    with torch.inference_mode():
        for length in lengths:
            ids = torch.arange(length).remainder(200).add(5).unsqueeze(0)
            seconds = []
            for _ in range(repeats + 1):
                begin = time.perf_counter()
                model(ids, logits_to_keep=1)
                seconds.append(time.perf_counter() - begin)
            rates[str(length)] = length / statistics.median(seconds[1:])
    version = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"version": version, "prefill": rates}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [int(length) for length in sys.argv[4:]])
