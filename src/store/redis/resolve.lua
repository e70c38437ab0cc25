-- ARGV: fence, state (empty: it had no effect), retention, and what stands in the record behind its header
if not state then return {key, 'conflict'} end
local owner_may_live = state >= TOMBSTONE or left > 0
if owner_may_live or string.sub(bytes, 53, 60) ~= ARGV[1] then return {key, 'conflict', fence} end
reply, wakes = {key, 'resolved'}, true
if ARGV[2] == '' then
  state = nil
else
  state, ends, expires, answer = tonumber(ARGV[2]), 0, now + tonumber(ARGV[3]), ARGV[4]
  -- The owner may still be alive. With another nonce in the record, its own completion is no repeated one.
  nonce = string.char(255 - string.byte(nonce)) .. string.sub(nonce, 2)
end
