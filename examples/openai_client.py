"""openai-python with our server: `pip install openai`, `python examples/openai_client.py [URL]`.

Writes apple.png, preview_*.png and blue.png into the current folder.
"""

import base64
import os
import pathlib
import sys

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
STEPS = 10


def save(name: str, data: str) -> None:
    pathlib.Path(name).write_bytes(base64.b64decode(data))
    print("saved", name)


client = openai.OpenAI(
    base_url=f"{URL}/v1", api_key=os.environ.get("JANUSFLOW_API_KEY", "none"), max_retries=2
)
model = client.models.list().data[0].id
print("model", model)

# Fields that OpenAI does not know go into extra_body. Image i gets seed + i.
options = {"seed": 1, "num_inference_steps": STEPS, "guidance_scale": 2.0}
answer = client.images.generate(model=model, prompt="a red apple", n=1, extra_body=options)
save("apple.png", answer.data[0].b64_json)

# Previews show where the image is heading.
stream = client.images.generate(
    model=model, prompt="a red apple", stream=True, partial_images=2, extra_body=options
)
for event in stream:
    if event.type == "image_generation.partial_image":
        save(f"preview_{event.partial_image_index}.png", event.b64_json)
    else:
        print("positions of prompt and image:", event.usage.total_tokens)

# A variation: half of the path is generated again. The model was not trained to edit.
with open("apple.png", "rb") as image:
    answer = client.images.edit(
        model=model, image=image, prompt="a blue apple", extra_body={"strength": 0.5, **options}
    )
save("blue.png", answer.data[0].b64_json)


def image_part(name: str) -> dict:
    data = base64.b64encode(pathlib.Path(name).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


# A conversation with several images and turns.
parts = [image_part("apple.png"), image_part("blue.png")]
messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "Describe them."}]}]
first = client.chat.completions.create(model=model, messages=messages, max_tokens=32)
print("answer:", first.choices[0].message.content)
messages.append({"role": "assistant", "content": first.choices[0].message.content})
messages.append({"role": "user", "content": "Which one is red?"})
pieces = client.chat.completions.create(
    model=model,
    messages=messages,
    max_tokens=32,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in pieces:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    elif chunk.usage:
        print(f"\n{chunk.usage.completion_tokens} tokens")
