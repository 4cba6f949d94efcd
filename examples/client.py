# %% [markdown]
# # A client of the server
#
# `msd serve` speaks OpenAI's HTTP interface, so OpenAI's own client works. This program starts a server on this
# machine, streams an answer about a photo, and stops the server. The statistics of drafting come with the last event.

# %%
import base64
import socket
import subprocess
import sys
import time

import openai

from msd.reference import sample_photos

TARGET, TOKENS = "reference", 48
PATIENCE = 600  # seconds to wait until the model is loaded
PHOTO = sample_photos()[0]

# %%
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
command = [sys.executable, "-m", "msd", "serve", "--target", TARGET, "--port", str(port), "--api-key", "secret"]
server = subprocess.Popen(command)
client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0)

# %%
text = ""
try:
    for _ in range(PATIENCE):
        try:
            model = client.models.list().data[0].id
            break
        except openai.APIConnectionError:
            assert server.poll() is None, "the server has ended"
            time.sleep(1.0)
    uri = "data:image/jpeg;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": "Describe the image."},
    ]
    stream = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for event in stream:
        for choice in event.choices:
            text += choice.delta.content or ""
            print(choice.delta.content or "", end="", flush=True)
        if event.usage:
            print("\n", event.usage.completion_tokens, "tokens;", (event.model_extra or {}).get("metrics"))
finally:
    server.terminate()
    server.wait()
assert text
