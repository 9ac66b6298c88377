-- The counters of `quota.Accounts` in Redis: how they are stored. With `limits.lua` and `operations.lua` behind it, this is
-- the one script that `shared_accounts` sends. An operation is one run of it: it happens whole, or not at all.
-- ARGV: the operation, its message as MessagePack, and the time ("" for Redis's own).
--
--   counts:<scope>    hash   what runs: requests, tokens and micros held
--   requests:<scope>  zset   the last minute's requests: id, by time
--   tokens:<scope>    zset   the last minute's tokens: "<sum up to here>:<amount>:<id>", by time, so that what any stretch
--                            of it adds up to is one subtraction
--   pace:<scope>      string when the next request would come if all came evenly (GCRA)
--   spend:<scope>:<period>:<first day>  hash  tokens, micros
--   held:<id>         string a running request: its worker, its scopes and what it holds
--   holds:<worker>    set    the ids of a worker's running requests; `workers`: who may have some
--   lease:<worker>    string there for as long as the worker lives
--   settled:<id>      string what settling it answered: a request that is over neither ends twice nor comes back

local WINDOW_S = 60
local KEEP_WINDOW_S = 70
local KEEP_PACE_S = 60
local MAX_PACE_S = 1e9
local KEEP_SPEND_S = 40 * 24 * 3600
-- A field that holds nothing: as nil it would be missing.
local NOTHING = cjson.null

local function key(kind, name)
  return "llmproxy:" .. kind .. ":" .. name
end

local function exact(number)
  return string.format("%.17g", number)
end

local function read_clock()
  local time = redis.call("TIME")
  return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local now = tonumber(ARGV[3]) or read_clock()

-- Logs that this run has rid of what is older than the window.
local pruned = {}

local function recent(log)
  if not pruned[log] then
    redis.call("ZREMRANGEBYSCORE", log, "-inf", exact(now - WINDOW_S))
    pruned[log] = true
  end
  return log
end

local function add_entry(log, at, member)
  redis.call("ZADD", log, exact(at), member)
  redis.call("EXPIRE", recent(log), KEEP_WINDOW_S)
end

local function entry_at(log, index)
  local found = redis.call("ZRANGE", log, index, index, "WITHSCORES")
  return found[1], tonumber(found[2])
end

local function leaves_in(at)
  return at and math.max(at + WINDOW_S - now, 0) or 0
end

local function requests_of(scope)
  return recent(key("requests", scope))
end

local function tokens_of(scope)
  return recent(key("tokens", scope))
end

local function tokens_at(log, index)
  local member, at = entry_at(log, index)
  if not member then
    return nil
  end
  local upto, amount = member:match("^(%d+):(%d+):")
  return { at = at, upto = tonumber(upto), amount = tonumber(amount) }
end

local function sum_of(log)
  local last = tokens_at(log, -1)
  if not last then
    return 0
  end
  local first = tokens_at(log, 0)
  return last.upto - first.upto + first.amount
end

local function add_tokens(scope, id, amount)
  local log = tokens_of(scope)
  local last = tokens_at(log, -1) or { at = now, upto = 0 }
  -- Not before the last one, whatever the clock does: the sums are in the order of the times.
  add_entry(log, math.max(now, last.at), string.format("%016.0f:%.0f:%s", last.upto + amount, amount, id))
end

-- Until so many of the oldest tokens have left. When they are not enough, what is held stands in the way.
local function tokens_leave_in(log, surplus)
  local first, last = tokens_at(log, 0), tokens_at(log, -1)
  if not last or last.upto - first.upto + first.amount < surplus then
    return WINDOW_S
  end
  local low, high = 0, redis.call("ZCARD", log) - 1
  while low < high do
    local middle = math.floor((low + high) / 2)
    if tokens_at(log, middle).upto - first.upto + first.amount >= surplus then
      high = middle
    else
      low = middle + 1
    end
  end
  return leaves_in(tokens_at(log, low).at)
end

-- As they are in this run.
local known_counts = {}

local function counts_of(scope)
  if not known_counts[scope] then
    local found = redis.call("HMGET", key("counts", scope), "requests", "tokens", "micros")
    known_counts[scope] = {
      requests = tonumber(found[1] or 0),
      tokens = tonumber(found[2] or 0),
      micros = tonumber(found[3] or 0),
    }
  end
  return known_counts[scope]
end

local function add_counts(scope, sign, held)
  local counts = counts_of(scope)
  counts.requests = counts.requests + sign
  counts.tokens = counts.tokens + sign * held.tokens
  counts.micros = counts.micros + sign * held.micros
  local stored = key("counts", scope)
  if counts.requests > 0 then
    redis.call(
      "HSET", stored,
      "requests", exact(counts.requests), "tokens", exact(counts.tokens), "micros", exact(counts.micros)
    )
  else
    redis.call("DEL", stored)
    known_counts[scope] = nil
  end
end

local function spend_of(scope, period, first_day)
  return key("spend", scope .. ":" .. period .. ":" .. first_day)
end

local function spent(limit)
  return tonumber(redis.call("HGET", spend_of(limit.scope, limit.per, limit.first_day), limit.unit) or 0)
end

local function add_spend(scope, period, first_day, settlement)
  local spend = spend_of(scope, period, first_day)
  redis.call("HINCRBY", spend, "tokens", exact(settlement.tokens))
  redis.call("HINCRBY", spend, "money", exact(settlement.micros))
  if period ~= "total" then
    redis.call("EXPIRE", spend, KEEP_SPEND_S)
  end
end

local function held_of(limit)
  local counts = counts_of(limit.scope)
  return limit.unit == "tokens" and counts.tokens or counts.micros
end

local function period_ends_in(limit)
  return limit.ends_at and math.max(limit.ends_at - now, 0) or NOTHING
end

local function pace_of(scope)
  return math.max(tonumber(redis.call("GET", key("pace", scope)) or 0), now)
end
