"""Start `vpt serve`, ask it about one of its own examples, and end it with SIGTERM.

python examples/serve_demo.py outputs/demo
"""

import base64
import re
import signal
import subprocess
import sys

import httpx
from openai import OpenAI

server = subprocess.Popen(
    [sys.executable, "-m", "vpt", "serve", f"checkpoint={sys.argv[1]}", "port=0"], stdout=subprocess.PIPE, text=True
)
assert server.stdout is not None
try:
    line = server.stdout.readline()
    print(line.strip())
    if not (page := re.search(r"page (\S+),", line)):
        sys.exit(server.wait() or 1)
    example = httpx.get(f"{page[1]}about").json()["examples"][1]
    image = base64.b64encode(httpx.get(page[1].rstrip("/") + example["url"]).content).decode()
    with OpenAI(base_url=f"{page[1]}v1", api_key="none") as client:
        model = client.models.list().data[0].id
        for action in ("free", "region"):
            parts = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
                {"type": "text", "text": example["question"]},
            ]
            reply = client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": parts}], extra_body={"action": action}
            )
            print(f"{action}: {example['question']}")
            for step in reply.choices[0].message.vpt["trace"]:
                print(f"  -> {step['note']}")
            print(f"  {reply.choices[0].message.content}")
finally:
    server.send_signal(signal.SIGTERM)
    code = server.wait(60)
print("stopped")
sys.exit(code)
