"""The scripts that change a tenant's semantic entries. Each runs alone on the server.

All keys of one tenant carry its name as their hash tag, so they lie on one node of a cluster. Beside those of KEYS a
script touches only what it finds under the same prefix: members and bodies of entries that it lets go.

| key of a tenant | |
|---|---|
| `about` | hash: `size cost hits partition` of each id; `#bytes`, `#entries`, `#inflation` of the tenant |
| `worth` | sorted set: priority of each id (GreedyDual-Size-Frequency, Cherkasova 1998) |
| `ends` | sorted set: when each id expires, in the server's milliseconds |
| `partitions` | hash: entries of each partition |
| `members:PARTITION` | hash: what an index needs of each id |
| `body:ID` | the answer; empty for a while after it was removed, so that a late write finds the place taken |

Priorities are doubles: they order entries and are no money.
"""

from __future__ import annotations

from router.adapters.redis_store.connection import Script

# The tenant's keys outlive the last of its entries by so much.
_SLACK_MS = 60_000

_COMMON = (
    f"""#!lua
local about, worth, ends, partitions = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local prefix = ARGV[1]
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local slack = {_SLACK_MS}
"""
    + """
local reply = {0}
local function text(number) return string.format('%.0f', number) end
local function told(id)
  local line = redis.call('HGET', about, id)
  if not line then return nil end
  return string.match(line, '^(%d+) (%d+) (%d+) (%S+)$')
end
local function drop(id)
  local size, _, _, partition = told(id)
  redis.call('ZREM', worth, id)
  redis.call('ZREM', ends, id)
  redis.call('HDEL', about, id)
  redis.call('UNLINK', prefix .. 'body:' .. id)
  if not size then return end
  redis.call('HINCRBY', about, '#bytes', '-' .. size)
  redis.call('HINCRBY', about, '#entries', -1)
  redis.call('HDEL', prefix .. 'members:' .. partition, id)
  if redis.call('HINCRBY', partitions, partition, -1) <= 0 then
    redis.call('HDEL', partitions, partition)
  end
  reply[#reply + 1] = partition
  reply[#reply + 1] = id
end
local function sweep()
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', ends, '-inf', now, 'LIMIT', 0, 100)) do drop(id) end
end
local function rank(id, size, cost, hits)
  local inflation = tonumber(redis.call('HGET', about, '#inflation') or '0')
  local priority = inflation + hits * math.max(cost, 1) / size
  redis.call('ZADD', worth, string.format('%.17g', priority), id)
end
"""
)

# KEYS: about, worth, ends, partitions, members of the partition, body. ARGV: prefix, id, partition, size, cost,
# quota, ttl ms, the member, the body. Reply: 1 stored, 0 not; then partition and id of each entry let go.
# Where the server itself let one of the tenant's keys go (maxmemory), the tenant starts over.
PUT = Script(
    _COMMON
    + """
local id, partition = ARGV[2], ARGV[3]
local size, cost, quota, ttl = tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local entries = tonumber(redis.call('HGET', about, '#entries') or '0')
if redis.call('ZCARD', worth) ~= entries or redis.call('ZCARD', ends) ~= entries then
  for _, name in ipairs(redis.call('HKEYS', partitions)) do
    redis.call('UNLINK', prefix .. 'members:' .. name)
  end
  redis.call('UNLINK', about, worth, ends, partitions)
end
sweep()
if size > quota or redis.call('EXISTS', KEYS[6]) == 1 then return reply end
if redis.call('HEXISTS', about, id) == 1 then drop(id) end
local evicted = 0
while tonumber(redis.call('HGET', about, '#bytes') or '0') + size > quota do
  local least = redis.call('ZRANGE', worth, 0, 0, 'WITHSCORES')
  if #least == 0 or evicted == 200 then return reply end
  redis.call('HSET', about, '#inflation', least[2])
  drop(least[1])
  evicted = evicted + 1
end
redis.call('SET', KEYS[6], ARGV[9], 'PX', ttl)
redis.call('HSET', KEYS[5], id, ARGV[8])
redis.call('HSET', about, id, ARGV[4] .. ' ' .. ARGV[5] .. ' 1 ' .. partition)
redis.call('HINCRBY', about, '#bytes', ARGV[4])
redis.call('HINCRBY', about, '#entries', 1)
redis.call('HINCRBY', partitions, partition, 1)
redis.call('ZADD', ends, text(now + ttl), id)
rank(id, size, cost, 1)
for i = 1, 5 do
  if redis.call('PTTL', KEYS[i]) < ttl then redis.call('PEXPIRE', KEYS[i], ttl + slack) end
end
reply[1] = 1
return reply
"""
)

# KEYS: about, worth, ends, partitions. ARGV: prefix, then id and further hits of each. Reply as above.
SERVED = Script(
    _COMMON
    + """
sweep()
for i = 2, #ARGV, 2 do
  local size, cost, hits, partition = told(ARGV[i])
  if size then
    hits = tonumber(hits) + tonumber(ARGV[i + 1])
    redis.call('HSET', about, ARGV[i], size .. ' ' .. cost .. ' ' .. text(hits) .. ' ' .. partition)
    rank(ARGV[i], tonumber(size), tonumber(cost), hits)
  end
end
return reply
"""
)

# KEYS: about, worth, ends, partitions, body. ARGV: prefix, id, the partition it must be of, ms for which its
# place stays taken (0: only tidies up after a body that is gone already). Reply as above.
REMOVE = Script(
    _COMMON
    + """
local size, _, _, partition = told(ARGV[2])
if size and partition ~= ARGV[3] then return reply end
if ARGV[4] == '0' and redis.call('EXISTS', KEYS[5]) == 1 then return reply end
sweep()
drop(ARGV[2])
redis.call('HDEL', prefix .. 'members:' .. ARGV[3], ARGV[2])
if ARGV[4] ~= '0' then redis.call('SET', KEYS[5], '', 'PX', ARGV[4]) end
reply[1] = 1
return reply
"""
)

# KEYS: the tenants of a partition, a set. ARGV: a tenant, ttl ms.
LOCATE = Script(
    """#!lua
redis.call('SADD', KEYS[1], ARGV[1])
if redis.call('PTTL', KEYS[1]) < tonumber(ARGV[2]) then redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 1
"""
)
