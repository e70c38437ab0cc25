-- ARGV: owner
if not state then return {key, 'released'} end
if state >= TOMBSTONE or string.sub(bytes, 37, 60) ~= ARGV[1] then return {key, 'superseded'} end
-- Only when nobody else ever held the key is there nothing that a deletion would hide.
if attempt == 1 then
  state = nil
elseif state == UNKNOWN then
  return {key, 'released'}
else
  lease, ends, expires = 0, now, now + retention
end
reply, wakes = {key, 'released'}, true
