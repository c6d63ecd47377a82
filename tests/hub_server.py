"""A stand-in for a package index and for the Hugging Face hub: the parts of their HTTP interfaces that clients use.

Files are served with ETag and Range. A file can be made to break off (`drop_after`), to ignore Range, to be refused, or
to wait; `requests` records what was asked.
"""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}  # path -> bytes
        self.pages = {}  # path -> (status, headers, body)
        self.drop_after = {}  # path -> list of byte counts, one used up by each GET, after which the connection breaks
        self.stall_after = {}  # path -> byte count after which the answer waits for `released`
        self.released = threading.Event()
        self.ignore_range = False
        self.password = None  # the Authorization header that everything needs
        self.requests = []  # (method, path, Range header)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """Clients break connections here on purpose."""

    def gets(self, path):
        """The Range headers of all GETs of `path`."""
        return [wanted for method, asked, wanted in self.requests if method == "GET" and asked == path]

    def add_package(self, name, file, wheel, metadata=None):
        """A simple index (PEP 503) with one wheel, and its metadata as a file of its own (PEP 658)."""
        path = f"/files/{file}"
        self.files[path] = wheel
        self.files[path + ".metadata"] = metadata
        digest = hashlib.sha256(metadata).hexdigest()
        attributes = f'data-core-metadata="sha256={digest}" data-dist-info-metadata="sha256={digest}"'
        link = f'<a href="{path}" {attributes}>{file}</a>'
        self.pages[f"/simple/{name}/"] = (200, {"Content-Type": "text/html"}, f"<html>{link}</html>".encode())
        return path

    def add_repository(self, name, files):
        """A model repository with one commit."""
        info = {"_id": "x", "id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
        info["siblings"] = [{"rfilename": file} for file in files]
        tree = [{"type": "file", "path": file, "size": len(data), "oid": etag(data)} for file, data in files.items()]
        for place, value in (("", info), ("/revision/main", info), (f"/revision/{COMMIT}", info)):
            self.pages[f"/api/models/{name}{place}"] = json_page(value)
        for revision in ("main", COMMIT):
            self.pages[f"/api/models/{name}/tree/{revision}"] = json_page(tree)
            self.files |= {f"/{name}/resolve/{revision}/{file}": data for file, data in files.items()}

    def refuse(self, prefix, status, code):
        """Answer every path below `prefix` with an error as the hub words it."""
        body = json.dumps({"error": code}).encode()
        self.pages[prefix + "*"] = (status, {"X-Error-Code": code, "X-Error-Message": code}, body)


def json_page(value):
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def etag(data):
    """git's hash of a file, as the hub uses it."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path, self.headers.get("Range")))
        if self.server.password and self.headers.get("Authorization") != self.server.password:
            return self.send(401, {"WWW-Authenticate": 'Basic realm="x"'}, b"")
        for prefix, page in self.server.pages.items():
            if prefix == path or (prefix.endswith("*") and path.startswith(prefix[:-1])):
                return self.send(*page)
        if path in self.server.files:
            return self.send_file(path, self.server.files[path])
        return self.send(404, {"X-Error-Code": "RepoNotFound" if path.startswith("/api/") else "EntryNotFound"}, b"{}")

    def send(self, status, headers, body):
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def send_file(self, path, data):
        headers = {"ETag": f'"{etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted, start = self.headers.get("Range"), 0
        if wanted and not self.server.ignore_range:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send_response(206 if "Content-Range" in headers else 200)
        for name, value in (headers | {"Content-Length": str(len(data) - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.send_body(path, data[start:])

    def send_body(self, path, body):
        drops = self.server.drop_after.get(path)
        if drops:
            self.wfile.write(body[: drops.pop(0)])
            self.close_connection = True
            return
        stall = self.server.stall_after.get(path)
        if stall is not None and not self.server.released.is_set():
            self.wfile.write(body[:stall])
            self.wfile.flush()
            self.server.released.wait(30)
            body = body[stall:]
        self.wfile.write(body)
