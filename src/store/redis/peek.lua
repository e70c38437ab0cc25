-- ARGV: 'replicated' or ''.
--
-- Returns the time and the bytes of the record, which the client decodes.
local behind = replica()
if behind then return behind end
if not state then return {key, 'absent'} end
if ARGV[1] == 'replicated' and state >= TOMBSTONE then
  -- WAIT counts only the replicas that have the writes of its own connection. This write changes
  -- nothing, but lets WAIT cover the response that is about to be shown.
  redis.call('PEXPIREAT', key, expiry())
end
return {key, 'record', now, bytes}
