-- Chat completions for wrk, every prompt its own: wrk ... URL -- KEY MODEL FIRST PROMPTS WORDS
-- PROMPTS holds one template a line with %s three times, WORDS one word a line. FIRST is the number of the first
-- prompt; two runs with ranges that do not overlap send no prompt twice. Lines without %s are sent as they are, one
-- after the other; a single one is the same every time.
local threads = {}

function setup(thread)
  table.insert(threads, thread)
end

local function lines(path)
  local read = {}
  for line in io.lines(path) do read[#read + 1] = line end
  return read
end

function init(args)
  model, at = args[2], tonumber(args[3])
  templates, words = lines(args[4]), lines(args[5])
  sent = 0
  wrk.method = "POST"
  wrk.headers["Content-Type"] = "application/json"
  wrk.headers["Authorization"] = "Bearer " .. args[1]
  local same = #templates == 1 and not string.find(templates[1], "%%s")
  fixed = same and wrk.format(nil, nil, nil, body_of(templates[1])) or nil
end

function body_of(prompt)
  return '{"model":"' .. model .. '","messages":[{"role":"user","content":"' .. prompt ..
    '"}],"temperature":0.2,"max_tokens":256}'
end

function request()
  sent = sent + 1
  if fixed then return fixed end
  local count = #words
  -- As in prompts.py: neighbouring numbers have no word in common.
  local spread = at * 7919 % count ^ 3
  local a = spread % count
  local b = math.floor(spread / count) % count
  local c = math.floor(spread / count ^ 2)
  local prompt = string.format(templates[at % #templates + 1], words[a + 1], words[b + 1], words[c + 1])
  at = at + 1
  return wrk.format(nil, nil, nil, body_of(prompt))
end

function done(summary, latency, requests)
  local total = 0
  for _, thread in ipairs(threads) do total = total + thread:get("sent") end
  -- wrk calls request() once on the first thread to look at what it gives.
  local sent_out = total - 1
  local errors = summary.errors
  io.write(string.format(
    'RESULT {"completed":%d,"sent":%d,"seconds":%f,"p50_us":%f,"p99_us":%f,"non_2xx":%d,"broken":%d}\n',
    summary.requests, sent_out, summary.duration / 1e6, latency:percentile(50), latency:percentile(99),
    errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
