"""A Hugging Face Hub on the loopback interface, for the unchanged client

Repositories are kept in memory and served the way `huggingface_hub` reads them, so nothing of the client has to be
replaced: HF_ENDPOINT is set to this hub. A test can make the hub fail, and the hub logs all requests.

There are differences from the real Hub: weights are not redirected to another host, there is no Xet storage, a revision
is `main` or its commit, and every client may write.
"""
import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

LARGE_FILES = ('.safetensors', '.bin')  # as in .gitattributes of a new repository
ERRORS = {  # X-Error-Code by what a repository is
    'missing': 'RepoNotFound',
    'gated': 'GatedRepo',
}


class Request(NamedTuple):
    """A request as it came in, `range` being the header without its unit (or None)."""
    method: str
    path: str
    range: str | None = None


@dataclass
class HubFile:
    """A file of a repository, and what goes wrong when it is fetched.

    Attributes:
        content: What was committed. The ETag is always that of this content.
        stored: What the hub has instead; HEAD announces its size.
        sent: What a GET gets instead, and HEAD knows nothing of it.
        breaks: For each GET to come, after how many bytes of the body the connection breaks.
    """
    content: bytes
    stored: bytes | None = None
    sent: bytes | None = None
    breaks: list[int] = field(default_factory=list)

    @property
    def is_large(self) -> bool:
        return len(self.content) > 2 ** 20

    @property
    def etag(self) -> str:
        """sha256 of a large file, git's sha1 of the others."""
        if self.is_large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b'blob %d\0' % len(self.content) + self.content).hexdigest()

    def body(self, method: str) -> bytes:
        if method == 'GET' and self.sent is not None:
            return self.sent
        return self.content if self.stored is None else self.stored


class _Refusal(Exception):
    """A response with an error code in the headers, which is where the client looks for it."""

    def __init__(self, status: int, code: str, message: str, **headers: str):
        super().__init__(message)
        self.status = status
        self.headers = {'X-Error-Code': code, 'X-Error-Message': message} | headers


class LoopbackHub:
    """A context manager: the hub is up inside of it.

    Attributes:
        endpoint: What HF_ENDPOINT has to be.
        repositories: The files of each repository by their names, to change as a test needs it.
        refusals: (status, 'missing' or 'gated') of repositories that are not given out, whether they exist or not.
        log: All requests so far.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, HubFile]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.log: list[Request] = []
        self.uploads: dict[str, bytes] = {}
        self.endpoint = ''

    def __enter__(self) -> 'LoopbackHub':
        self._start(port=0)
        self.endpoint = f'http://127.0.0.1:{self._server.server_port}'
        return self

    def __exit__(self, *args) -> None:
        self._stop()

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        """Connections are refused inside of this context."""
        port = self._server.server_port
        self._stop()
        try:
            yield
        finally:
            self._start(port)

    def _start(self, port: int) -> None:
        self._server = _Server(('127.0.0.1', port), _Handler)
        self._server.hub = self
        threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.05}, daemon=True).start()

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for connection in self._server.connections:  # the client keeps them for its next request
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add(self, repo_id: str, files: Mapping[str, bytes] | Path) -> dict[str, HubFile]:
        """Make or replace a repository from contents, or from a folder."""
        if isinstance(files, Path):
            files = {path.name: path.read_bytes() for path in files.iterdir()}
        self.repositories[repo_id] = {name: HubFile(content) for name, content in files.items()}
        return self.repositories[repo_id]

    def commit(self, repo_id: str) -> str:
        """Where `main` stands."""
        files = sorted((name, file.etag) for name, file in self.repositories[repo_id].items())
        return hashlib.sha1(json.dumps([repo_id, files]).encode()).hexdigest()

    def requests(self, repo_id: str, method: str | None = None) -> list[Request]:
        """What was asked of the files of a repository, and by a certain method if that is given."""
        return [
            request for request in self.log
            if request.path.startswith(f'/{repo_id}/resolve/') and method in (None, request.method)
        ]

    def find(self, repo_id: str, revision: str, name: str) -> HubFile:
        status, what = self.refusals.get(repo_id, (404, 'missing'))
        if repo_id in self.refusals or repo_id not in self.repositories:
            message = 'Repository not found' if what == 'missing' else f'Access to model {repo_id} is restricted.'
            raise _Refusal(status, ERRORS[what], message)
        commit = self.commit(repo_id)
        if revision not in ('main', commit):
            raise _Refusal(404, 'RevisionNotFound', f'Invalid rev id: {revision}')
        if name not in self.repositories[repo_id]:
            raise _Refusal(404, 'EntryNotFound', 'Entry not found', **{'X-Repo-Commit': commit})
        return self.repositories[repo_id][name]


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args):
        super().__init__(*args)
        self.connections: list[socket.socket] = []

    def process_request(self, request: socket.socket, client_address: tuple[str, int]) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(self._resolve)

    def do_GET(self) -> None:
        self._answer(self._resolve)

    def do_POST(self) -> None:
        self._answer(self._write)

    def do_PUT(self) -> None:
        self._answer(self._write)

    def _answer(self, respond) -> None:
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        wanted = self.headers.get('Range')
        hub.log.append(Request(self.command, path, wanted and wanted.removeprefix('bytes=')))
        body = self._read_body()
        try:
            respond(hub, path, body)
        except _Refusal as refusal:
            self._send(refusal.status, json.dumps({'error': str(refusal)}).encode(), refusal.headers)

    def _read_body(self) -> bytes:
        if self.headers.get('Transfer-Encoding') != 'chunked':
            return self.rfile.read(int(self.headers.get('Content-Length', 0)))
        body = b''
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], break_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in ({'Content-Length': str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body[:break_after])
        if break_after is not None:
            self.close_connection = True

    def _resolve(self, hub: LoopbackHub, path: str, _: bytes) -> None:
        """A file, or a part of it."""
        match = re.fullmatch(r'/([^/]+/[^/]+)/resolve/([^/]+)/(.+)', path)
        if match is None:
            raise _Refusal(404, 'EntryNotFound', f'No such page: {path}')
        repo_id, revision, name = match.groups()
        file = hub.find(repo_id, revision, name)
        body = file.body(self.command)
        headers = {
            'ETag': f'"{file.etag}"', 'X-Repo-Commit': hub.commit(repo_id), 'Accept-Ranges': 'bytes',
            'Content-Type': 'application/octet-stream',
        }
        if file.is_large:
            headers |= {'X-Linked-ETag': f'"{file.etag}"', 'X-Linked-Size': str(len(file.body('HEAD')))}
        status = 200
        if wanted := re.fullmatch(r'bytes=(\d+)-(\d*)', self.headers.get('Range', '')):
            first, last = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
            if first > last:
                raise _Refusal(416, 'RangeNotSatisfiable', 'Range', **{'Content-Range': f'bytes */{len(body)}'})
            headers['Content-Range'] = f'bytes {first}-{last}/{len(body)}'
            status, body = 206, body[first:last + 1]
        break_after = file.breaks.pop(0) if self.command == 'GET' and file.breaks else None
        self._send(status, body, headers, break_after)

    def _write(self, hub: LoopbackHub, path: str, body: bytes) -> None:
        """What `create_repo` and `upload_folder` need: small files are in the commit, large ones are put before it."""
        if path.startswith('/uploads/'):
            oid = path.removeprefix('/uploads/')
            if hashlib.sha256(body).hexdigest() != oid:
                raise _Refusal(400, 'BadRequest', f'The content does not have the sha256 {oid}')
            hub.uploads[oid] = body
            return self._send(200, b'', {})
        if path.endswith('.git/info/lfs/objects/batch'):
            objects = json.loads(body)['objects']
            actions = ({'upload': {'href': f'{hub.endpoint}/uploads/{item["oid"]}'}} for item in objects)
            return self._reply(
                objects=[item | {'actions': action} for item, action in zip(objects, actions, strict=True)])
        if path == '/api/repos/create':
            asked = json.loads(body)
            repo_id = f'{asked["organization"]}/{asked["name"]}'
            hub.repositories.setdefault(repo_id, {})
            return self._reply(name=repo_id, url=f'{hub.endpoint}/{repo_id}')
        if path == '/api/validate-yaml':
            return self._reply(errors=[], warnings=[])
        if re.fullmatch(r'/api/models/[^/]+/[^/]+/preupload/main', path):
            names = [file['path'] for file in json.loads(body)['files']]
            modes = ['lfs' if name.endswith(LARGE_FILES) else 'regular' for name in names]
            return self._reply(files=[
                {'path': name, 'uploadMode': mode, 'shouldIgnore': False}
                for name, mode in zip(names, modes, strict=True)
            ])
        if match := re.fullmatch(r'/api/models/([^/]+/[^/]+)/commit/main', path):
            repo_id, files = match[1], hub.repositories[match[1]]
            for line in map(json.loads, body.splitlines()):
                value = line['value']
                if line['key'] == 'file':
                    files[value['path']] = HubFile(base64.b64decode(value['content']))
                elif line['key'] == 'lfsFile':
                    files[value['path']] = HubFile(hub.uploads[value['oid']])
            commit = hub.commit(repo_id)
            return self._reply(success=True, commitOid=commit, commitUrl=f'{hub.endpoint}/{repo_id}/commit/{commit}')
        raise _Refusal(404, 'EntryNotFound', f'No such page: {path}')

    def _reply(self, **fields) -> None:
        self._send(200, json.dumps(fields).encode(), {'Content-Type': 'application/json'})
