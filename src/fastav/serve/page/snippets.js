// A question as code that asks it.

/** A JSON value as Python writes it. */
export function python(value) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (typeof value === "object")
    return `{${Object.entries(value)
      .map(([key, item]) => `${JSON.stringify(key)}: ${python(item)}`)
      .join(", ")}}`;
  return JSON.stringify(value);
}

/** A text as one argument of a POSIX shell. */
const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

const isUpload = (clip) => Boolean(clip) && clip.fileId.startsWith("file-");

export function pythonCode({ origin, model, clip, question, plan, maxTokens, hasKey }) {
  const id = !clip ? null : isUpload(clip) ? "clip.id" : python(clip.fileId);
  const lines = [
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${python(`${origin}/v1`)}, api_key=${hasKey ? '"YOUR KEY"' : '"none"'})`,
  ];
  if (isUpload(clip))
    lines.push(`clip = client.files.create(file=open(${python(clip.name)}, "rb"), purpose="user_data")`);
  lines.push(
    "answer = client.chat.completions.create(",
    `    model=${python(model)},`,
    '    messages=[{"role": "user", "content": [',
    ...(id ? [`        {"type": "file", "file": {"file_id": ${id}}},`] : []),
    `        {"type": "text", "text": ${python(question)}},`,
    "    ]}],",
    `    max_tokens=${maxTokens},`,
    "    temperature=0,",
    `    extra_body={"fastav": ${python(plan)}},`,
    ")",
    "print(answer.choices[0].message.content)",
    'print(answer.usage.model_extra["fastav"])  # tokens per layer, FLOPs, KV cache, seconds',
  );
  return lines.join("\n");
}

export function curlCode({ origin, model, clip, question, plan, maxTokens, hasKey }) {
  const key = hasKey ? ' -H "Authorization: Bearer $KEY"' : "";
  const lines = [];
  let id = clip ? clip.fileId : null;
  if (isUpload(clip)) {
    lines.push(
      `curl -s ${origin}/v1/files${key} -F purpose=user_data -F ${shell(`file=@${clip.name}`)}  # prints the file's id`,
      "",
    );
    id = clip.fileId;
  }
  const content = [...(id ? [{ type: "file", file: { file_id: id } }] : []), { type: "text", text: question }];
  const body = { model, messages: [{ role: "user", content }], max_tokens: maxTokens, temperature: 0, fastav: plan };
  lines.push(
    `curl -s ${origin}/v1/chat/completions${key} -H 'Content-Type: application/json' \\`,
    `  -d ${shell(JSON.stringify(body, null, 2))}`,
  );
  return lines.join("\n");
}
