"""Reads a training run back with the packages that people use: `read_back.py EXPERIMENT [WANDB_RUN]` prints one JSON object.

`tensorboard` reads the experiment's event files. The messages of the W&B run are decoded with `wandb`'s own classes; the log
is read with its `DataStore`, or, where the package no longer has that class in Python, record by record.
"""

import glob
import json
import os
import struct
import sys
import zlib


def tensorboard(experiment):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(experiment, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    scalars = {tag: [[e.step, e.value] for e in events.Scalars(tag)] for tag in tags["scalars"]}
    texts = {
        tag: [[e.step, e.tensor_proto.string_val[0].decode()] for e in events.Tensors(tag)] for tag in tags["tensors"]
    }
    return {"scalars": scalars, "texts": texts}


def messages(path):
    try:
        import wandb
        from wandb.sdk.internal.datastore import DataStore

        wandb._assert_is_internal_process = True
        store = DataStore()
        store.open_for_scan(path)
        while (data := store.scan_data()) is not None:
            yield data
        return
    except ImportError:
        pass
    data = open(path, "rb").read()
    assert data[:7] == b":W&B\xe1\xbe\x00", data[:7]
    at, message = 7, b""
    while at < len(data):
        room = 32768 - at % 32768
        if room < 7:
            assert not any(data[at : at + room])
            at += room
            continue
        crc, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part = data[at + 7 : at + 7 + length]
        assert zlib.crc32(bytes([kind]) + part) == crc
        assert kind in ((1, 2) if not message else (3, 4))
        at, message = at + 7 + length, message + part
        if kind in (1, 4):
            yield message
            message = b""


def wandb_run(run):
    from wandb.proto.wandb_internal_pb2 import Record

    name = os.path.basename(run).rsplit("-", 1)[1]
    out = {"id": name, "history": [], "summary": {}, "output": []}
    value = lambda item: json.loads(item.value_json)
    for number, data in enumerate(messages(f"{run}/run-{name}.wandb"), 1):
        record = Record()
        record.ParseFromString(data)
        assert record.num == number
        kind = record.WhichOneof("record_type")
        if kind == "run":
            assert record.run.run_id == name
            out["project"], out["name"] = record.run.project, record.run.display_name
            out["config"] = {item.key: value(item) for item in record.run.config.update}
        elif kind == "history":
            row = {".".join(item.nested_key): value(item) for item in record.history.item}
            assert row["_step"] == record.history.step.num
            out["history"].append(row)
        elif kind == "summary":
            out["summary"].update({".".join(item.nested_key): value(item) for item in record.summary.update})
        elif kind == "output_raw":
            out["output"].append(record.output_raw.line)
        elif kind == "exit":
            out["exit_code"] = record.exit.exit_code
    return out


result = {"tensorboard": tensorboard(sys.argv[1])}
if len(sys.argv) > 2:
    import yaml

    result["wandb"] = wandb_run(sys.argv[2])
    config = yaml.safe_load(open(f"{sys.argv[2]}/files/config.yaml"))
    result["config_yaml"] = {key: entry["value"] for key, entry in config.items()}
    result["summary_json"] = json.load(open(f"{sys.argv[2]}/files/wandb-summary.json"))
    result["metadata"] = json.load(open(glob.glob(f"{sys.argv[2]}/files/wandb-metadata.json")[0]))
print(json.dumps(result))
