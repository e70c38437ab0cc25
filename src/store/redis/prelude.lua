-- What every script begins with: the time, and the record as src/protocol/codec.rs lays it out (version 1), each field a local;
-- `state` is nil where there is no record, or one that has expired. The transitions are those of src/protocol/record.rs, and
-- tests/redis_store/oracle.rs compares the two. What changes nothing returns; what goes on is written and told by finale.lua.
-- Straight on and without tables, because a server runs all of it each time. Numbers are doubles: the client caps durations so
-- that all of them stay below 2^53.
local IN_FLIGHT, UNKNOWN, TOMBSTONE, KEPT = 0, 1, 2, 3
local EXECUTE, RECOVER = 0, 1
local LAYOUT, HEADER, EXACT = '<BBBc33c16I8I4I8I8I8I8', 96, 9007199254740992

local key = KEYS[1]
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]

local bytes = redis.pcall('GET', key)
-- What cannot be read is somebody's live record: nothing is written over it.
if type(bytes) == 'table' then
  return string.find(bytes.err, 'WRONGTYPE', 1, true) and {key, 'corrupt'} or bytes
end
local version, state, kind, fingerprint, nonce, fence, attempt, lease, retention, ends, expires
-- What is left of the lease. Never more than one lease, should the clock have gone backwards.
local left = 0
if bytes then
  if #bytes < HEADER then return {key, 'corrupt'} end
  version, state, kind, fingerprint, nonce, fence, attempt, lease, retention, ends, expires = struct.unpack(LAYOUT, bytes)
  -- The same question as Record::from_bytes asks.
  local is_sound = version == 1 and kind <= RECOVER and fence < EXACT
  if state == KEPT then
    is_sound = is_sound and ends == 0 and #bytes >= HEADER + 4 and struct.unpack('<I4', bytes, HEADER + 1) <= #bytes - HEADER - 4
  else
    is_sound = is_sound and state < KEPT and #bytes == HEADER and (state == IN_FLIGHT or ends == 0)
  end
  if not is_sound then return {key, 'corrupt'} end
  if state == IN_FLIGHT then left = math.max(0, math.min(ends, now + lease) - now) end
  if now >= expires and left == 0 then state = nil end
end

-- The key outlives the record by a second: the record's own fields decide (a live lease outlasts any retention), the key's
-- expiry frees memory.
local function expiry()
  return math.ceil(math.max(expires, ends) / 1000) + 1000
end

-- For finale.lua: what stands behind the header, the reply, whether somebody may wait for the change, and whether the reply is as
-- good where a full server refuses the write.
local answer, reply, wakes, is_optional = '', nil, false, false
