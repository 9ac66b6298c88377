-- Each limit: whether it stands in a request's way, and how much of it is used.

-- When a request that runs stands in the way: it may end at any time.
local MAY_END_S = 1
-- Of a slot that is free now: clocks are floats.
local TOLERANCE_S = 1e-4

-- nil: it does not. Else the seconds until another try may be worth it; NOTHING: never.
local wait = {}
-- used, held, seconds until it is as if nothing had been used
local use = {}

function wait.concurrency(limit)
  if counts_of(limit.scope).requests + 1 > limit.allowed then
    return limit.allowed > 0 and MAY_END_S or NOTHING
  end
end

function use.concurrency(limit)
  return 0, counts_of(limit.scope).requests, 0
end

-- What was too far ahead is no more, under a limit that is not the one it was.
local function paced(limit)
  return math.min(pace_of(limit.scope), now + limit.allowed / limit.rps)
end

function wait.rps(limit)
  if limit.rps == 0 or limit.allowed == 0 then
    return NOTHING
  end
  local interval = 1 / limit.rps
  local wait_s = paced(limit) + interval - limit.allowed * interval - now
  if wait_s > TOLERANCE_S then
    return wait_s
  end
end

function use.rps(limit)
  local ahead_s = limit.rps > 0 and paced(limit) - now or 0
  return math.max(math.ceil(ahead_s * limit.rps - TOLERANCE_S), 0), 0, ahead_s
end

function wait.rpm(limit)
  local log = requests_of(limit.scope)
  local surplus = redis.call("ZCARD", log) + 1 - limit.allowed
  if surplus > 0 then
    if limit.allowed == 0 then
      return NOTHING
    end
    local _, at = entry_at(log, surplus - 1)
    return leaves_in(at)
  end
end

function use.rpm(limit)
  local log = requests_of(limit.scope)
  local _, newest = entry_at(log, -1)
  return redis.call("ZCARD", log), 0, leaves_in(newest)
end

function wait.tpm(limit, ask)
  local need = math.max(ask.is_bound and ask.tokens or math.min(ask.tokens, limit.allowed), 1)
  local log = tokens_of(limit.scope)
  local surplus = sum_of(log) + counts_of(limit.scope).tokens + need - limit.allowed
  if surplus > 0 then
    return need <= limit.allowed and tokens_leave_in(log, surplus) or NOTHING
  end
end

function use.tpm(limit)
  local log = tokens_of(limit.scope)
  local newest = tokens_at(log, -1)
  return sum_of(log), counts_of(limit.scope).tokens, leaves_in(newest and newest.at)
end

function wait.budget(limit, ask)
  local need = ask.is_bound and math.max(limit.unit == "tokens" and ask.tokens or ask.micros, 1) or 1
  local used = spent(limit)
  if used + held_of(limit) + need <= limit.allowed then
    return nil
  end
  if need > limit.allowed then
    return NOTHING
  end
  return used + need <= limit.allowed and MAY_END_S or period_ends_in(limit)
end

function use.budget(limit)
  return spent(limit), held_of(limit), period_ends_in(limit)
end

local function standing(limit)
  local used, held, reset_s = use[limit.limit](limit)
  return {
    scope = limit.scope,
    limit = limit.limit,
    allowed = limit.allowed,
    used = used,
    held = held,
    reset_s = reset_s,
    per = limit.per,
    unit = limit.unit,
  }
end

-- Whoever comes back is to be let in: of the limits that stand in the way, the last one to give way. nil: none does.
local function denial(ask)
  local last, longest
  for _, limit in ipairs(ask.limits) do
    local wait_s = wait[limit.limit](limit, ask)
    if wait_s and (not last or (longest ~= NOTHING and (wait_s == NOTHING or wait_s > longest))) then
      last, longest = limit, wait_s
    end
  end
  return last and { standing = standing(last), wait_s = longest }
end

local function standings(limits)
  local found = {}
  for index, limit in ipairs(limits) do
    found[index] = standing(limit)
  end
  return found
end
