-- ARGV: owner
local record, refusal = read()
if refusal then return refusal end
if not record then return {'released'} end
if record.state >= TOMBSTONE or not is_owned(record, ARGV[1]) then return {'superseded'} end
-- Only when nobody else ever held the key is there nothing that a deletion would hide.
if record.attempt == 1 then
  redis.call('DEL', key)
elseif record.state == IN_FLIGHT then
  lease_for(record, 0)
  refusal = put(record)
  if refusal then return refusal end
end
wake()
return {'released'}
