"""As much of wandb's server as a run needs."""

from __future__ import annotations

import json
import socket
from http.server import BaseHTTPRequestHandler

from tests.tracking.hand_made import RUN_ID


class FakeServer(BaseHTTPRequestHandler):
    """As much of wandb's server as a run needs; ``how`` it answers is a path's last part: /down/401, /down/close …"""

    how = "200"
    num_rows = 0
    """Of the run, that it has already."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/down/"):
            type(self).how, how = self.path.rpartition("/")[2], "200"
        else:
            how = self.how
        if how == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        answer = json.dumps({"data": self._answer(body), "errors": None} if how == "200" else {"error": "no"}).encode()
        self.send_response(int(how))
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST  # noqa: N815  http.server's names

    def _answer(self, body):
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}}
        if self.path == "/graphql" and b"mutation UpsertBucket" in body:
            bucket = {"id": "b", "name": RUN_ID, "displayName": RUN_ID, "config": "{}", "historyLineCount": 0}
            return {"upsertBucket": {"inserted": True, "bucket": {**bucket, "project": project}}}
        if b"notifyScriptableRunAlert" in body:
            return {"notifyScriptableRunAlert": {"success": True}}
        if b"createRunFiles" in body:
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        return {"model": {**project, "bucket": self._known()}} if b"RunResumeStatus" in body else {}

    def _known(self):
        if not self.num_rows:
            return None
        tail = json.dumps([json.dumps({"_step": self.num_rows - 1, "_runtime": 5})])
        counts = {"historyLineCount": self.num_rows, "eventsLineCount": 0, "logLineCount": 0}
        texts = {"historyTail": tail, "eventsTail": "[]", "summaryMetrics": "{}", "config": "{}", "tags": []}
        return {"id": "b", "name": RUN_ID, **counts, **texts, "wandbConfig": json.dumps({"t": 1})}

    def log_message(self, *_):
        pass
