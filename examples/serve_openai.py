"""Asks a server for text, with the `openai` client.

    wush-compile serve CHECKPOINT                              # in another shell; prints its address
    python examples/serve_openai.py CHECKPOINT [URL] [KEY]     # default: http://127.0.0.1:8000/v1

The server is vLLM where it is installed, else transformers' own. Both speak the API of OpenAI, as many clients do.
"""

import sys

from openai import OpenAI


def main(checkpoint: str, url: str = "http://127.0.0.1:8000/v1", key: str = "none") -> None:
    client = OpenAI(base_url=url, api_key=key)
    prompt = "Once upon a time"
    stream = client.completions.create(model=checkpoint, prompt=prompt, max_tokens=32, temperature=0, stream=True)
    print(prompt, end="")
    for event in stream:
        print(event.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
