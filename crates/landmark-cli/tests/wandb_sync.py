"""Lets `wandb sync` send an offline run to a server on this machine that only takes notes: `wandb_sync.py RUN` prints, as one
JSON object, what would have reached Weights & Biases.
"""

import gzip
import http.server
import json
import os
import subprocess
import sys
import tempfile
import threading

noted = {"history": [], "config": {}, "summary": {}, "files": []}


class Notes(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/graphql":
            self.query(json.loads(body).get("variables") or {})
        elif self.path.endswith("/file_stream"):
            self.stream(json.loads(body))
        bucket = {"id": "B", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0}
        bucket["project"] = {"id": "P", "name": "project", "entity": {"id": "E", "name": "entity"}}
        viewer = {"id": "V", "entity": "entity", "username": "user", "flags": "{}", "teams": {"edges": []}}
        files = {"runID": "run", "uploadHeaders": [], "files": []}
        upsert = {"bucket": bucket, "inserted": True}
        self.reply({"data": {"upsertBucket": upsert, "viewer": viewer, "createRunFiles": files}})

    do_PUT = do_POST

    def reply(self, answer):
        answer = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def query(self, variables):
        if variables.get("config"):
            config = json.loads(variables["config"])
            noted["config"] = {key: entry["value"] for key, entry in config.items()}
        if variables.get("displayName"):
            noted["display_name"] = variables["displayName"]
        noted["files"] += variables.get("files") or []

    def stream(self, body):
        files = body.get("files") or {}
        noted["history"] += map(json.loads, files.get("wandb-history.jsonl", {}).get("content", []))
        for line in files.get("wandb-summary.json", {}).get("content", []):
            noted["summary"] = json.loads(line)
        if body.get("complete"):
            noted["exit_code"] = body.get("exitcode")


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Notes)
threading.Thread(target=server.serve_forever, daemon=True).start()
environment = dict(os.environ, WANDB_API_KEY="0" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}")
sync = [sys.executable, "-m", "wandb", "sync", os.path.abspath(sys.argv[1])]
with tempfile.TemporaryDirectory() as folder:
    # It leaves logs of its own where it runs.
    done = subprocess.run(sync, env=environment, cwd=folder, capture_output=True, text=True, timeout=60)
if done.returncode != 0:
    sys.exit(done.stdout + done.stderr)
noted["said"] = done.stdout + done.stderr
print(json.dumps(noted))
