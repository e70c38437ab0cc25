-- ARGV: owner (nonce and fence), state, retention in microseconds, the bytes behind the header.
--
-- Each branch is one case of `Record::complete`.
if not state then return {key, 'superseded'} end
local is_owner = string.sub(bytes, 37, 60) == ARGV[1]
-- A repeated completion by the owner succeeds and changes nothing (I2).
if state >= TOMBSTONE and is_owner then
  -- This write changes nothing. According to its documentation, WAIT covers only the writes of its
  -- own connection, and the first completion may have come on another one. (Redis 7.0 covers the
  -- writes of all connections, but nothing promises that it always will.)
  redis.call('PEXPIREAT', key, expiry())
  return {key, 'completed'}
end
-- Another attempt has completed the record: return the outcome that stands.
if state >= TOMBSTONE then return {key, 'superseded', bytes} end
-- Only the owner changes a claim (I8).
if not is_owner then return {key, 'superseded'} end
state, ends, expires, response = tonumber(ARGV[2]), 0, now + tonumber(ARGV[3]), ARGV[4]
reply, wakes = {key, 'completed'}, true
