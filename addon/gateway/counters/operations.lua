-- What can be asked: each operation is one run of the script.

local KEEP_SETTLED_S = 3600
local SHARES = { 0.8, 1 }
-- So many requests of a dead worker are given back at once: others wait for as long.
local GIVE_BACK = 200

local function hold(ask)
  for _, scope in ipairs(ask.scopes) do
    add_counts(scope, 1, ask)
    add_entry(key("requests", scope), now, ask.id)
  end
  for _, limit in ipairs(ask.limits) do
    if limit.limit == "rps" then
      local pace = paced(limit) + 1 / limit.rps
      local keep_s = math.min(math.ceil(pace - now) + KEEP_PACE_S, MAX_PACE_S)
      redis.call("SET", key("pace", limit.scope), exact(pace), "EX", exact(keep_s))
    end
  end
  local held = { worker = ask.worker, scopes = ask.scopes, tokens = ask.tokens, micros = ask.micros }
  redis.call("SET", key("held", ask.id), cmsgpack.pack(held))
  redis.call("SADD", key("holds", ask.worker), ask.id)
  redis.call("SADD", "llmproxy:workers", ask.worker)
end

local function release(id)
  local packed = redis.call("GET", key("held", id))
  if not packed then
    return nil
  end
  local held = cmsgpack.unpack(packed)
  for _, scope in ipairs(held.scopes) do
    add_counts(scope, -1, held)
  end
  redis.call("DEL", key("held", id))
  redis.call("SREM", key("holds", held.worker), id)
  return held
end

local operations = {}

-- One that is held already is in, and is asked for again because the answer was lost. NOTHING: it was given up.
function operations.admit(ask)
  if redis.call("EXISTS", key("settled", ask.id)) == 1 then
    return NOTHING
  end
  if redis.call("EXISTS", key("held", ask.id)) == 0 then
    local denied = denial(ask)
    if denied then
      return { denial = denied, standings = standings(ask.limits) }
    end
    hold(ask)
  end
  return { denial = NOTHING, standings = standings(ask.limits) }
end

function operations.settle(settlement)
  local answer = redis.call("GET", key("settled", settlement.id))
  if answer then
    return cmsgpack.unpack(answer)
  end
  local held = release(settlement.id)
  for _, scope in ipairs(held and held.scopes or {}) do
    if not settlement.was_served then
      redis.call("ZREM", key("requests", scope), settlement.id)
    end
    if settlement.tokens > 0 then
      add_tokens(scope, settlement.id, settlement.tokens)
    end
  end
  if settlement.tokens > 0 or settlement.micros > 0 then
    for _, scope in ipairs(settlement.scopes) do
      for period, first_day in pairs(settlement.first_days) do
        add_spend(scope, period, first_day, settlement)
      end
    end
  end
  local passed = {}
  for _, limit in ipairs(settlement.budgets) do
    local after = spent(limit)
    local before = after - (limit.unit == "tokens" and settlement.tokens or settlement.micros)
    for _, share in ipairs(SHARES) do
      if before < share * limit.allowed and share * limit.allowed <= after then
        local event = { at = now, scope = limit.scope, per = limit.per, unit = limit.unit, share = share }
        event.allowed, event.used = limit.allowed, after
        table.insert(passed, event)
      end
    end
  end
  redis.call("SET", key("settled", settlement.id), cmsgpack.pack(passed), "EX", KEEP_SETTLED_S)
  return passed
end

function operations.standings(message)
  return standings(message.limits)
end

-- Answers whether the worker had a lease still, and which workers have none.
function operations.renew(lease)
  local had = redis.call("EXISTS", key("lease", lease.worker)) == 1
  redis.call("SET", key("lease", lease.worker), "", "PX", exact(lease.keep_ms))
  redis.call("SADD", "llmproxy:workers", lease.worker)
  local dead = {}
  for _, worker in ipairs(redis.call("SMEMBERS", "llmproxy:workers")) do
    if redis.call("EXISTS", key("lease", worker)) == 0 then
      table.insert(dead, worker)
    end
  end
  return { had = had, dead = dead }
end

-- A worker that ends: what it holds is everybody's to give back from now on.
function operations.leave(lease)
  redis.call("DEL", key("lease", lease.worker))
  return true
end

-- Gives back some of what a worker without a lease holds; answers how many requests that were. 0: it is forgotten.
function operations.give_back(lease)
  if redis.call("EXISTS", key("lease", lease.worker)) == 1 then
    return 0
  end
  local ids = redis.call("SRANDMEMBER", key("holds", lease.worker), GIVE_BACK)
  for _, id in ipairs(ids) do
    release(id)
    redis.call("SREM", key("holds", lease.worker), id)
  end
  if #ids == 0 then
    redis.call("SREM", "llmproxy:workers", lease.worker)
  end
  return #ids
end

return cmsgpack.pack(operations[ARGV[1]](cmsgpack.unpack(ARGV[2])))
