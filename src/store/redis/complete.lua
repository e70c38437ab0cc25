-- ARGV: owner, state, retention, and what stands in the record behind its header
if not state then return {key, 'superseded'} end
local is_owner = string.sub(bytes, 37, 60) == ARGV[1]
if state >= TOMBSTONE and is_owner then
  -- Changes nothing, and yet is a write. By its documentation, WAIT asks only for writes of its own connection, and the first
  -- completion may have come on another. (Redis 7.0 asks for everybody's; nothing promises that it always will.)
  redis.call('PEXPIREAT', key, expiry())
  return {key, 'completed'}
end
if state >= TOMBSTONE then return {key, 'superseded', bytes} end
if not is_owner then return {key, 'superseded'} end
state, ends, expires, answer = tonumber(ARGV[2]), 0, now + tonumber(ARGV[3]), ARGV[4]
reply, wakes = {key, 'completed'}, true
