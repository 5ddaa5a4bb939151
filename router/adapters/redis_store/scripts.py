"""The scripts that change budget counters. Each runs alone on the server: nothing is read and then written.

A window is one hash (`spent`, `used` = spent + held, `read_at` and `born` of its seed, `hold:ID` per hold)
and one sorted set with the holds' expiry; both are lost together or not at all, for a lost hash makes the
script start over. Sums go through HINCRBY (64-bit integers: exact up to $9.2 billion); Lua's own numbers are
doubles, so amounts are compared as decimal text, by length and then by digit. All times are the server's.
"""

from __future__ import annotations

from router.adapters.redis_store.connection import Script

# A hash nobody uses any more goes after its month. It is far longer than a cached answer lives: under
# `maxmemory-policy volatile-ttl` the cache makes room first.
KEEP_MS = 100 * 24 * 3600 * 1000

_COMMON = """#!lua
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function text(number) return string.format('%.0f', number) end
local function above(a, b)
  if #a ~= #b then return #a > #b end
  return a > b
end
local function release(window, expiry, id)
  local amount = redis.call('HGET', window, 'hold:' .. id)
  if amount then
    if amount ~= '0' then redis.call('HINCRBY', window, 'used', '-' .. amount) end
    redis.call('HDEL', window, 'hold:' .. id)
  end
  redis.call('ZREM', expiry, id)
end
local function state(window, expiry)
  local values = redis.call('HMGET', window, 'spent', 'used', 'born')
  if not values[1] then return nil end
  local due = redis.call('ZRANGEBYSCORE', expiry, '-inf', now, 'LIMIT', 0, 1000)
  if #due == 0 then return values end
  for _, id in ipairs(due) do release(window, expiry, id) end
  return redis.call('HMGET', window, 'spent', 'used', 'born')
end
"""

# KEYS: window, expiry for each charge. ARGV: hold id, amount, ttl ms, then for each charge the most that may
# be used before this amount (cap - amount; empty: no cap). Reply: verdict (0 a window is missing, 1 granted,
# 2 denied), the charge's index, then spent, used, born for each window ('' where missing).
RESERVE = Script(
    _COMMON
    + """
local id, amount, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
local reply = {1, 0}
for i = 1, #KEYS, 2 do
  local values = state(KEYS[i], KEYS[i + 1])
  if not values then
    reply[1] = 0
    values = {'', '', ''}
  end
  for j = 1, 3 do reply[#reply + 1] = values[j] end
end
if reply[1] == 0 then return reply end
for i = 1, #KEYS / 2 do
  local room, used = ARGV[3 + i], reply[3 * i + 1]
  if room ~= '' and (string.sub(room, 1, 1) == '-' or above(used, room)) then
    reply[1], reply[2] = 2, i
    return reply
  end
end
for i = 1, #KEYS / 2 do
  local window = KEYS[2 * i - 1]
  redis.call('HINCRBY', window, 'used', amount)
  reply[3 * i + 1] = redis.call('HGET', window, 'used')
  redis.call('HINCRBY', window, 'hold:' .. id, amount)
  redis.call('ZADD', KEYS[2 * i], now + ttl, id)
end
return reply
"""
)

# Any number of settlements. KEYS for each: marker of the hold, then window, expiry, late for each window. ARGV:
# marker's ttl ms, the ledger's lag ms, late's ttl ms, then for each: hold id, cost ('' only releases), age of
# the settlement ms, number of windows.
# A settlement so old that the reading a window was seeded from (or will be) holds it is not booked again.
SETTLE = Script(
    _COMMON
    + """
local marker_ttl, lag, late_ttl = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local key = 0
for argument = 4, #ARGV, 4 do
  local id, cost = ARGV[argument], ARGV[argument + 1]
  local settled_at = now - tonumber(ARGV[argument + 2])
  key = key + 1
  local book = cost ~= '' and redis.call('SET', KEYS[key], '1', 'NX', 'PX', marker_ttl)
  for _ = 1, tonumber(ARGV[argument + 3]) do
    local window, expiry, late = KEYS[key + 1], KEYS[key + 2], KEYS[key + 3]
    key = key + 3
    local read_at = redis.call('HGET', window, 'read_at')
    if read_at then
      release(window, expiry, id)
      if book and settled_at > tonumber(read_at) - lag then
        redis.call('HINCRBY', window, 'spent', cost)
        redis.call('HINCRBY', window, 'used', cost)
      end
    elseif book and settled_at > now - lag then
      redis.call('INCRBY', late, cost)
      redis.call('PEXPIRE', late, late_ttl)
    end
  end
end
return #ARGV
"""
)

# KEYS: window, expiry for each. Reply: spent, used, born for each ('' where missing).
READ = Script(
    _COMMON
    + """
local reply = {}
for i = 1, #KEYS, 2 do
  local values = state(KEYS[i], KEYS[i + 1]) or {'', '', ''}
  for j = 1, 3 do reply[#reply + 1] = values[j] end
end
return reply
"""
)

# KEYS: window, expiry, late, then the marker of each hold. ARGV: spent, age of the reading ms, a name for this
# seed, ttl ms, ttl of holds ms, then id and amount of each hold the seeding worker has in flight.
# The first seed wins; what was settled while nobody counted the window is added.
SEED = Script(
    _COMMON
    + """
if redis.call('HEXISTS', KEYS[1], 'spent') == 1 then return 0 end
local late = redis.call('GET', KEYS[3]) or '0'
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
redis.call('HSET', KEYS[1], 'spent', ARGV[1], 'used', ARGV[1],
  'read_at', text(now - tonumber(ARGV[2])), 'born', ARGV[3])
redis.call('HINCRBY', KEYS[1], 'spent', late)
redis.call('HINCRBY', KEYS[1], 'used', late)
redis.call('PEXPIRE', KEYS[1], ARGV[4])
for i = 4, #KEYS do
  local id, amount = ARGV[2 * i - 2], ARGV[2 * i - 1]
  if redis.call('EXISTS', KEYS[i]) == 0 then
    redis.call('HINCRBY', KEYS[1], 'used', amount)
    redis.call('HSET', KEYS[1], 'hold:' .. id, amount)
    redis.call('ZADD', KEYS[2], now + tonumber(ARGV[5]), id)
  end
end
return 1
"""
)

# KEYS: marker, window, expiry. ARGV: hold id, amount, ttl ms. Makes a hold at least this large: one that was
# granted while Redis was away, or that a lost window held. No cap applies, the money is already promised.
RESTORE = Script(
    _COMMON
    + """
if redis.call('EXISTS', KEYS[1]) == 1 or redis.call('HEXISTS', KEYS[2], 'spent') == 0 then return 0 end
local more = tonumber(ARGV[2]) - tonumber(redis.call('HGET', KEYS[2], 'hold:' .. ARGV[1]) or '0')
if more <= 0 then return 0 end
redis.call('HINCRBY', KEYS[2], 'used', text(more))
redis.call('HINCRBY', KEYS[2], 'hold:' .. ARGV[1], text(more))
redis.call('ZADD', KEYS[3], now + tonumber(ARGV[3]), ARGV[1])
return 1
"""
)

# KEYS: the sorted set of workers. ARGV: this worker's id, ms after which a silent one no longer counts. Reply:
# how many are alive.
ANNOUNCE = Script(
    """#!lua
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return redis.call('ZCARD', KEYS[1])
"""
)
