"""A server on this machine that speaks as much of the hub's protocol as uploads and downloads of models need."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHA = "a" * 40
TOKEN = "hf_local"


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: `files` maps OWNER/NAME to path to bytes. Large files come as LFS objects."""

    def __init__(self):
        self.files, self.objects, self.private = {}, {}, {}
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, data, status=200, **headers):
        sent = data if isinstance(data, bytes) else json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)

    def missing(self):
        self.reply({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")

    def do_POST(self):
        sent, path = self.body(), self.path.partition("?")[0]
        if self.headers.get("Authorization") not in (f"Bearer {TOKEN}", None) or not self.headers.get("Authorization"):
            return self.reply({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(sent)
            name = f"{wanted['organization']}/{wanted['name']}" if wanted.get("organization") else wanted["name"]
            self.server.files.setdefault(name, {})
            self.server.private[name] = wanted.get("private") or wanted.get("visibility") == "private"
            return self.reply({"url": f"{self.server.url}/{name}"})
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/preupload/main", path):
            modes = [{"path": file["path"], "shouldIgnore": False, "oid": None,
                      "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                     for file in json.loads(sent)["files"]]  # fmt: skip
            return self.reply({"files": modes})
        if match := re.fullmatch(r"/(\w+/\w+)\.git/info/lfs/objects/batch", path):
            objects = [one | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                       for one in json.loads(sent)["objects"]]  # fmt: skip
            return self.reply({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/commit/main", path):
            for line in map(json.loads, sent.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[match[1]][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[match[1]][value["path"]] = self.server.objects[value["oid"]]
            return self.reply(
                {"commitOid": SHA, "commitUrl": f"{self.server.url}/{match[1]}/commit/{SHA}", "success": True}
            )
        self.reply({"error": path}, 404)

    def do_PUT(self):
        self.server.objects[self.path.rpartition("/")[2]] = self.body()
        self.reply({})

    def do_GET(self):
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/(\w+/\w+)(?:/revision/\w+)?", path):
            if (files := self.server.files.get(match[1])) is None:
                return self.missing()
            siblings = [{"rfilename": name} for name in files]
            return self.reply({"id": match[1], "sha": SHA, "siblings": siblings, "private": True})
        if match := re.fullmatch(r"/api/models/(\w+/\w+)/tree/\w+/?", path):
            if (files := self.server.files.get(match[1])) is None:
                return self.missing()
            return self.reply([{"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                               for name, data in files.items()])  # fmt: skip
        if match := re.fullmatch(r"/(\w+/\w+)/resolve/\w+/(.+)", path):
            data = self.server.files.get(match[1], {}).get(match[2])
            if data is None:
                return self.reply({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
            return self.reply(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=SHA)
        self.reply({"error": path}, 404)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass
