-- ARGV: whether replicas must have the answer. Only the time and the bytes: the client decodes and decides.
local behind = replica()
if behind then return behind end
if not state then return {key, 'absent'} end
if ARGV[1] == 'replicated' and state >= TOMBSTONE then
  -- WAIT asks only about what its own connection wrote.
  redis.call('PEXPIREAT', key, expiry())
end
return {key, 'record', now, bytes}
