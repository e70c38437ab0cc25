-- The beginning of every script. It reads the server's time and the record. Each field of the
-- record becomes a local, in the layout of src/protocol/codec.rs (version 1). `state` is nil if
-- there is no record, or if the record has expired.
--
-- The transitions are those of src/protocol/record.rs; tests/stores/redis/oracle.rs compares the
-- two. A script that changes nothing returns early. Otherwise commit.lua writes the record and
-- replies.
--
-- This is straight-line code without tables, because the server executes all of it on every call.
-- Numbers are doubles. The client caps durations so that all numbers stay below 2^53.
local IN_FLIGHT, UNKNOWN, TOMBSTONE, STORED = 0, 1, 2, 3
local EXECUTE, RECOVER = 0, 1
local LAYOUT, HEADER, EXACT = '<BBBc33c16I8I4I8I8I8I8', 96, 9007199254740992

local key = KEYS[1]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local bytes = redis.pcall('GET', key)
-- A value that cannot be read may be a live record of a newer version, so never overwrite it.
if type(bytes) == 'table' then
  return string.find(bytes.err, 'WRONGTYPE', 1, true) and {key, 'corrupt'} or bytes
end
local version, state, kind, fingerprint, nonce, fence, attempt, lease, retention, ends, expires
-- The time that is left of the lease, in microseconds. It is at most one lease, even if the clock
-- went backwards.
local left = 0
if bytes then
  if #bytes < HEADER then return {key, 'corrupt'} end
  version, state, kind, fingerprint, nonce, fence, attempt, lease, retention, ends, expires = struct.unpack(LAYOUT, bytes)
  -- The same check as in `Record::from_bytes`.
  local is_sound = version == 1 and kind <= RECOVER and fence < EXACT
  if state == STORED then
    is_sound = is_sound and ends == 0 and #bytes >= HEADER + 4 and struct.unpack('<I4', bytes, HEADER + 1) <= #bytes - HEADER - 4
  else
    is_sound = is_sound and state < STORED and #bytes == HEADER and (state == IN_FLIGHT or ends == 0)
  end
  if not is_sound then return {key, 'corrupt'} end
  if state == IN_FLIGHT then left = math.max(0, math.min(ends, now + lease) - now) end
  if now >= expires and left == 0 then state = nil end
end

-- Returns the expiry of the key in milliseconds, rounded up and one second after the record's own.
-- The fields of the record decide when it expires, and a live lease outlasts any retention. The
-- expiry of the key only frees memory.
local function expiry()
  return math.ceil(math.max(expires, ends) / 1000) + 1000
end

-- The input of commit.lua: the bytes behind the header, the reply, whether to wake waiters, and
-- whether the reply stays correct if a full server refuses the write.
local response, reply, wakes, is_optional = '', nil, false, false
