"""Runs several fine-tunings in each of the processes that `accelerate launch` starts; importing is what takes long.

    accelerate launch ... train_driver.py RUNS.json

RUNS.json holds a list of [name, arguments, whether sharded by FSDP2]; the statuses are written beside it.
"""

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

from anomalysd_pipeline import train

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ResnetBlock2D",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""What `accelerate launch --config_file configs/accelerate/fsdp.yaml` sets."""

if __name__ == "__main__":
    path, statuses = Path(sys.argv[1]), {}
    for name, arguments, sharded in json.loads(path.read_text()):
        if sharded:
            os.environ.update(FSDP)
            # accelerate shards on GPUs only, though PyTorch does it on CPUs too.
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        statuses[name] = train.main(arguments)
    path.with_name(f"statuses-{os.environ['RANK']}.json").write_text(json.dumps(statuses))
